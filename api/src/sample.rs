//! What an agent tells the RPS: `POST /v1/samples` with one [`SampleBatch`] an interval.
//!
//! Figures are *deltas over the interval that ends at `t`* where the name says so (`_ns`, `_bytes` of traffic,
//! `_ops`, `_packets`), and the state at `t` otherwise (`rss_bytes`). A delta is never negative: the agent
//! notices counter resets and clock steps.

use serde::{Deserialize, Serialize};

use crate::{HostId, UnixMs, VmId};

/// The version of this module's types; the RPS refuses a batch of another version by name.
pub const SAMPLE_VERSION: u32 = 1;

/// Most VMs a batch may carry.
pub const VMS_MAX: usize = 4096;

/// One interval of one host.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleBatch {
    pub version: u32,
    pub host: HostId,
    /// When this agent process started. With `seq` it names the batch, so that one that is sent twice
    /// counts once.
    pub agent_start: UnixMs,
    pub seq: u64,
    /// End of the interval.
    pub t: UnixMs,
    pub interval_ms: u64,
    pub node: HostSample,
    pub vms: Vec<VmSample>,
}

/// The host as a whole.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSample {
    /// CPUs that VMs may use.
    pub cpus: f64,
    /// Time that these CPUs worked for somebody; niced work, which yields to VMs, is left out.
    pub cpu_busy_ns: u64,
    pub mem_total_bytes: u64,
    pub mem_available_bytes: u64,
    pub swap_total_bytes: u64,
    pub swap_free_bytes: u64,
}

/// One VM.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSample {
    pub vm: VmId,
    pub name: String,
    pub pid: u32,
    /// The QEMU was started to wait for an incoming migration: a shadow, unless a switchover made it the
    /// primary since. The RPS knows which.
    pub incoming: bool,
    pub vcpus: u32,
    pub cpu: CpuSample,
    pub mem: MemSample,
    pub block: BlockSample,
    pub net: NetSample,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuSample {
    /// Time the vCPU threads ran.
    pub vcpu_run_ns: u64,
    /// Time all other threads of the process ran.
    pub emulator_run_ns: u64,
    /// Time the vCPU threads were runnable and waited for a CPU.
    pub vcpu_wait_ns: u64,
    /// The same for all other threads.
    pub emulator_wait_ns: u64,
}

impl CpuSample {
    pub fn run_ns(&self) -> u64 {
        self.vcpu_run_ns + self.emulator_run_ns
    }

    pub fn wait_ns(&self) -> u64 {
        self.vcpu_wait_ns + self.emulator_wait_ns
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemSample {
    pub rss_bytes: u64,
    /// RAM the guest was given.
    pub guest_bytes: u64,
}

/// Buckets of [`BlockSample::latency_us_log2`]: bucket `i` counts requests of `[2^i, 2^(i+1))` µs, the first one
/// also those below 1 µs, the last one all above.
pub const LATENCY_BUCKETS: usize = 24;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSample {
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_ops: u64,
    pub write_ops: u64,
    /// Issue to completion, reads and writes together; at most [`LATENCY_BUCKETS`] counts.
    pub latency_us_log2: Vec<u64>,
}

/// Traffic as the guest sees it: received is what the host sent into the tap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSample {
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
}

/// What is wrong with a batch that decoded.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SampleError {
    #[error("sample version {0} is not spoken here, only {SAMPLE_VERSION}")]
    Version(u32),
    #[error("{0} VMs in one batch, at most {VMS_MAX} are taken")]
    TooManyVms(usize),
    #[error("interval_ms is {0}, expected 1 to 3600000")]
    Interval(u64),
    #[error("node.cpus is {0}, expected a number above 0")]
    Cpus(f64),
    #[error("VM {0} appears twice in one batch with incoming = {1}")]
    Duplicate(VmId, bool),
    #[error("VM {vm}: {field} is {value}, more than {max} possible in {interval_ms} ms")]
    Impossible {
        vm: VmId,
        field: &'static str,
        value: u64,
        max: u64,
        interval_ms: u64,
    },
    #[error("VM {0}: {1} latency buckets, at most {LATENCY_BUCKETS} are known")]
    Buckets(VmId, usize),
}

impl SampleBatch {
    /// Checks what a type cannot say. An error names the field and the value.
    pub fn validate(&self) -> Result<(), SampleError> {
        if self.version != SAMPLE_VERSION {
            return Err(SampleError::Version(self.version));
        }
        if self.vms.len() > VMS_MAX {
            return Err(SampleError::TooManyVms(self.vms.len()));
        }
        if !(1..=3_600_000).contains(&self.interval_ms) {
            return Err(SampleError::Interval(self.interval_ms));
        }
        if !(self.node.cpus.is_finite() && self.node.cpus > 0.0) {
            return Err(SampleError::Cpus(self.node.cpus));
        }
        let mut seen = std::collections::BTreeSet::new();
        self.vms.iter().try_for_each(|v| {
            if !seen.insert((v.vm, v.incoming)) {
                return Err(SampleError::Duplicate(v.vm, v.incoming));
            }
            v.validate(self.interval_ms)
        })
    }
}

impl VmSample {
    fn validate(&self, interval_ms: u64) -> Result<(), SampleError> {
        if self.block.latency_us_log2.len() > LATENCY_BUCKETS {
            return Err(SampleError::Buckets(self.vm, self.block.latency_us_log2.len()));
        }
        // A thread cannot run longer than the interval; 10,000 threads are more than any QEMU has, and twice
        // that leaves room for timer jitter.
        let max = interval_ms * 1_000_000 * 20_000;
        let fields = [
            ("cpu.vcpu_run_ns", self.cpu.vcpu_run_ns),
            ("cpu.emulator_run_ns", self.cpu.emulator_run_ns),
            ("cpu.vcpu_wait_ns", self.cpu.vcpu_wait_ns),
            ("cpu.emulator_wait_ns", self.cpu.emulator_wait_ns),
        ];
        match fields.into_iter().find(|(_, v)| *v > max) {
            Some((field, value)) => Err(SampleError::Impossible {
                vm: self.vm,
                field,
                value,
                max,
                interval_ms,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: u128) -> VmSample {
        VmSample {
            vm: VmId(uuid::Uuid::from_u128(n)),
            name: format!("vm{n}"),
            pid: 1,
            incoming: false,
            vcpus: 1,
            cpu: CpuSample::default(),
            mem: MemSample::default(),
            block: BlockSample::default(),
            net: NetSample::default(),
        }
    }

    fn batch() -> SampleBatch {
        SampleBatch {
            version: SAMPLE_VERSION,
            host: "a".parse().unwrap(),
            agent_start: UnixMs(1),
            seq: 1,
            t: UnixMs(1000),
            interval_ms: 1000,
            node: HostSample {
                cpus: 2.0,
                ..HostSample::default()
            },
            vms: vec![vm(1), vm(2)],
        }
    }

    #[test]
    fn a_good_batch_survives_the_round_trip() {
        let b = batch();
        b.validate().unwrap();
        let text = serde_json::to_string(&b).unwrap();
        assert_eq!(serde_json::from_str::<SampleBatch>(&text).unwrap(), b);
    }

    #[test]
    fn bad_batches_are_refused_by_name() {
        let mut b = batch();
        b.version = 9;
        assert_eq!(b.validate(), Err(SampleError::Version(9)));
        let mut b = batch();
        b.node.cpus = f64::NAN;
        assert!(matches!(b.validate(), Err(SampleError::Cpus(_))));
        let mut b = batch();
        b.vms.push(vm(2));
        assert!(b.validate().unwrap_err().to_string().contains("appears twice"));
        let mut b = batch();
        b.vms[1].cpu.vcpu_wait_ns = u64::MAX;
        assert!(b.validate().unwrap_err().to_string().contains("cpu.vcpu_wait_ns"));
        let mut b = batch();
        b.interval_ms = 0;
        assert_eq!(b.validate(), Err(SampleError::Interval(0)));
    }

    #[test]
    fn an_unknown_field_is_an_error_and_named() {
        let mut v = serde_json::to_value(batch()).unwrap();
        v["vms"][0]["cpu"]["stolen"] = 1.into();
        let e = serde_json::from_value::<SampleBatch>(v).unwrap_err();
        assert!(e.to_string().contains("stolen"), "{e}");
    }
}
