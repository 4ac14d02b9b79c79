//! The RPS's API as the commands use it: paths in, the answer's text out. Text, since `--json` prints it as it came, and
//! the tables are drawn from the same bytes.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use umbra_api::VmId;
use umbra_api::view::VmSummary;
use umbra_daemon::client::{Client, ClientError};
use umbra_daemon::http::Method;

use crate::error::Error;

pub struct Rps {
    client: Client,
}

impl Rps {
    pub fn new(base: &str, timeout: Duration) -> Result<Self, Error> {
        let client = Client::new(base, timeout).map_err(|e| failure(base, false, e))?;
        Ok(Self { client })
    }

    pub fn base(&self) -> &str {
        self.client.base()
    }

    pub async fn get(&self, path: &str) -> Result<String, Error> {
        self.client
            .get_text(path)
            .await
            .map_err(|e| failure(self.base(), false, e))
    }

    pub async fn send(&self, method: Method, path: &str, body: &impl Serialize) -> Result<String, Error> {
        self.client
            .send_text(method, path, body)
            .await
            .map_err(|e| failure(self.base(), true, e))
    }

    /// The answer's text as a view.
    pub fn view<T: DeserializeOwned>(&self, text: &str) -> Result<T, Error> {
        serde_json::from_str(text).map_err(|e| Error::Foreign {
            url: self.base().to_owned(),
            cause: e.to_string(),
        })
    }

    pub async fn vms(&self) -> Result<Vec<VmSummary>, Error> {
        self.view(&self.get("/v1/vms").await?)
    }

    /// What the operator typed, as the id that the API's paths want. A UUID is passed on unasked: the RPS knows best
    /// whether it has such a VM.
    pub async fn vm_id(&self, wanted: &str) -> Result<VmId, Error> {
        match wanted.parse() {
            Ok(id) => Ok(id),
            Err(_) => Ok(crate::vms::find(wanted, &self.vms().await?)?.vm),
        }
    }
}

/// `changes`: the request may have had an effect although no answer came.
fn failure(base: &str, changes: bool, e: ClientError) -> Error {
    let url = base.to_owned();
    match e {
        // The client makes such a problem itself when a peer answers with an error that is no problem document.
        ClientError::Refused { problem, .. } if problem.code == "http" => Error::Foreign {
            url,
            cause: problem.to_string(),
        },
        ClientError::Refused { problem, .. } => Error::Refused(*problem),
        ClientError::Unreachable { reason, .. } => {
            // A connection that never stood carried nothing.
            let sent = changes && !reason.contains("(Connect)");
            Error::Unreachable {
                url,
                cause: last_cause(&reason),
                sent,
            }
        }
        ClientError::Timeout { after, .. } => {
            let cause = format!("no answer within {} s", after.as_secs_f64());
            Error::Unreachable {
                url,
                cause,
                sent: changes,
            }
        }
        ClientError::Answer { reason, .. } => Error::Foreign { url, cause: reason },
        ClientError::Address { reason, .. } => Error::Unreachable {
            url,
            cause: reason,
            sent: false,
        },
    }
}

/// hyper's chain of causes begins with its own layers; the operating system's words stand last.
fn last_cause(reason: &str) -> String {
    reason.trim_start_matches("client error (Connect): ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_api::problem::Problem;

    fn refused(code: &str) -> ClientError {
        let problem = Box::new(Problem::new(409, code, "t", "d"));
        ClientError::Refused {
            url: "http://x/v1".into(),
            problem,
        }
    }

    #[test]
    fn an_error_page_of_some_other_server_is_told_apart() {
        assert!(matches!(
            failure("http://x", false, refused("http")),
            Error::Foreign { .. }
        ));
        assert_eq!(failure("http://x", true, refused("wrong_stage")).exit_code(), 4);
    }

    #[test]
    fn only_a_request_that_may_have_arrived_is_called_uncertain() {
        let unreachable = |reason: &str| ClientError::Unreachable {
            url: "u".into(),
            reason: reason.into(),
        };
        let told = |changes, reason: &str| failure("http://x", changes, unreachable(reason)).to_string();
        assert!(!told(true, "client error (Connect): tcp connect error: Connection refused").contains("It may"));
        assert!(told(true, "connection closed before message completed").contains("It may"));
        assert!(!told(false, "connection closed before message completed").contains("It may"));
    }
}
