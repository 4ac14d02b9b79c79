//! Counts what cargo's test runs say, so that a skipped test is seen as skipped.
//!
//! A test that cannot run on a machine prints `SKIPPED: reason` and returns. To libtest it has passed, and without `--show-output`
//! nobody would see the line. With it, the output of passed tests follows the list of tests:
//!
//! ```text
//! test a ... ok
//! successes:
//! ---- a stdout ----
//! SKIPPED: needs root
//! successes:
//!     a
//! test result: ok. 1 passed; 0 failed; …
//! ```

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: Vec<String>,
    pub skipped: Vec<(String, String)>,
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    pub fn summary(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        )
    }
}

/// Reads the standard output of `cargo test … -- --show-output`, line by line.
#[derive(Default)]
pub struct Reader {
    tally: Tally,
    /// Inside the outputs of passed tests, and of which test.
    passed_test: Option<String>,
    in_successes: bool,
    /// Of the test program that is being read, for which no result line came yet: tests whose line ended in FAILED, and
    /// those in the list at the end. The list is better (a line can be torn by what a test writes past libtest), but a
    /// program that crashes prints none.
    failed_here: Vec<String>,
    listed_here: Vec<String>,
    in_list: bool,
    skipped_here: Vec<(String, String)>,
}

impl Reader {
    /// Takes one line; whether it is worth showing.
    pub fn line(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.in_successes = true;
            self.passed_test = None;
            return false;
        }
        if line == "failures:" {
            self.in_successes = false;
            self.in_list = true;
            return true;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
            return true;
        }
        if self.in_successes {
            self.success_line(line)
        } else {
            self.test_line(line)
        }
    }

    /// The output of passed tests is noise, but for the reason of a skip.
    fn success_line(&mut self, line: &str) -> bool {
        if let Some(name) = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----")) {
            self.passed_test = Some(name.to_string());
            return false;
        }
        let Some(reason) = line.trim_start().strip_prefix("SKIPPED: ") else {
            return false;
        };
        // The first line counts: a test is skipped once, however much it says about it.
        if let Some(test) = self.passed_test.take() {
            self.skipped_here.push((test, reason.trim().to_string()));
        }
        false
    }

    fn test_line(&mut self, line: &str) -> bool {
        match line.strip_prefix("    ").filter(|_| self.in_list) {
            Some(name) => self.listed_here.push(name.to_string()),
            None => self.in_list = false,
        }
        if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            self.failed_here.push(name.to_string());
        }
        if let Some((name, reason)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... ignored")) {
            let reason = reason.trim_start_matches(", ").trim();
            let reason = if reason.is_empty() { "ignored" } else { reason };
            self.skipped_here.push((name.to_string(), reason.to_string()));
        }
        !line.is_empty() && !line.starts_with("running 0 tests")
    }

    /// `ok. 3 passed; 1 failed; 0 ignored; …` ends one test program.
    fn result(&mut self, text: &str) {
        let count = |what: &str| {
            let mut parts = text.split([';', '.']).map(str::trim);
            parts
                .find_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        let (passed, failed, ignored) = (count("passed"), count("failed"), count("ignored"));
        let printed = self.skipped_here.len() as u64 - ignored.min(self.skipped_here.len() as u64);
        self.tally.passed += passed.saturating_sub(printed);
        if !self.listed_here.is_empty() {
            self.failed_here = std::mem::take(&mut self.listed_here);
        }
        // The count of the result line wins over the names that were understood.
        while (self.failed_here.len() as u64) < failed {
            self.failed_here.push("a test whose line was not understood".into());
        }
        self.tally.failed.append(&mut self.failed_here);
        self.tally.skipped.append(&mut self.skipped_here);
        self.in_successes = false;
        self.passed_test = None;
    }

    /// Ends the reading. A run that ended badly although no test failed (a crash, code that does not compile) is a failure
    /// with the name of the step.
    pub fn finish(mut self, step: &str, success: bool) -> Tally {
        self.tally.failed.append(&mut self.failed_here);
        self.tally.skipped.append(&mut self.skipped_here);
        if !success && self.tally.failed.is_empty() {
            self.tally
                .failed
                .push(format!("{step} ended badly without saying which test failed"));
        }
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, success: bool) -> (Tally, Vec<&str>) {
        let mut reader = Reader::default();
        let shown = text.lines().filter(|line| reader.line(line)).collect();
        (reader.finish("units", success), shown)
    }

    const MIXED: &str = "
running 4 tests
test a ... ok
test b ... ok
test c ... FAILED
test d ... ignored, too slow

successes:

---- a stdout ----
noise
SKIPPED: needs root
SKIPPED: and more

---- b stdout ----
all is well

successes:
    a
    b

failures:

---- c stdout ----
SKIPPED: this test failed, and is not skipped
thread 'c' panicked

failures:
    c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
running 1 test
test e ... ok

successes:

successes:
    e

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s
";

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let (tally, shown) = read(MIXED, false);
        assert_eq!(tally.summary(), "2 passed, 1 failed, 2 skipped");
        assert_eq!(tally.failed, ["c"]);
        let skipped: Vec<_> = tally
            .skipped
            .iter()
            .map(|(test, why)| (test.as_str(), why.as_str()))
            .collect();
        assert_eq!(skipped, [("d", "too slow"), ("a", "needs root")]);
        assert!(shown.contains(&"thread 'c' panicked"));
        assert!(!shown.contains(&"noise"));
    }

    #[test]
    fn a_crash_is_a_failure() {
        let (tally, _) = read("running 2 tests\ntest a ... ok\n", false);
        assert_eq!(tally.failed.len(), 1);
        let (tally, _) = read("running 1 test\ntest a ... FAILED\n", false);
        assert_eq!(tally.failed, ["a"]);
    }

    #[test]
    fn the_list_names_a_test_whose_line_was_torn() {
        let text = "running 1 test\ntest a::b ... noise\nFAILED\n\nfailures:\n\n---- a::b stdout ----\n    indented\n\n\
                    failures:\n    a::b\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured\n";
        assert_eq!(read(text, false).0.failed, ["a::b"]);
    }
}
