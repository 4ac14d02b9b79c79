//! The load: a neighbour that swells so steadily that a forecaster can see it coming.

use super::scene::CONTENDED_MS;

/// Seconds since the start, and the share of each vCPU.
pub type Point = (f64, f64);

#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// What the neighbour burns.
    pub neighbour: Vec<Point>,
    pub neighbour_vcpus: u32,
    /// Requests to the web VM a second.
    pub per_second: u32,
    /// CPU time of one request.
    pub work_us: u32,
    /// Pages that the web VM dirties a second.
    pub dirty: u32,
    /// What both runs are compared over.
    pub window_s: f64,
    /// The run with Umbra ends by then, home again or not.
    pub patience_s: f64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            // The slow part is for the forecaster to see, the steep one is what it saves the web VM from.
            neighbour: vec![
                (0.0, 0.02),
                (14.0, 0.02),
                (50.0, 0.15),
                (58.0, 0.95),
                (78.0, 0.95),
                (84.0, 0.02),
            ],
            // At its peak two threads want the one core that the web VM runs on: it gets a third.
            neighbour_vcpus: 2,
            per_second: 20,
            work_us: 8_000,
            dirty: 300,
            window_s: 92.0,
            patience_s: 160.0,
        }
    }
}

impl Plan {
    /// As the guest's `POST /burn` takes it.
    pub fn burn(&self) -> String {
        self.neighbour
            .iter()
            .map(|(t, share)| format!("{t}:{share}"))
            .collect::<Vec<_>>()
            .join(",")
    }

    pub fn words(&self) -> String {
        let points = self
            .neighbour
            .iter()
            .map(|(t, share)| format!("{:.0} % at {t:.0} s", share * 100.0));
        points.collect::<Vec<_>>().join(", ")
    }

    /// How the RPS is to decide. The defaults are made for days, this day has three minutes.
    pub fn policy(&self) -> String {
        format!(
            "horizon_slots = 40\n\
             \n[contention]\n\
             threshold = 0.3\n\
             limit_ms_per_s = {CONTENDED_MS:.1}\n\
             max_history_slots = 25\n\
             \n[policy]\n\
             provision_slots = 2\n\
             copy_margin_s = 3.0\n\
             mem_reserve_bytes = 134217728\n\
             arm_s = 15.0\n\
             switch_lead_s = 3.0\n\
             measured_slots = 3\n\
             min_standby_s = 60.0\n\
             calm_slots = 5\n\
             calm_probability = 0.3\n\
             min_stay_s = 45.0\n\
             cooldown_s = 5.0\n\
             vms = [{{ vm = \"neighbour\", protect = false }}]\n"
        )
    }
}
