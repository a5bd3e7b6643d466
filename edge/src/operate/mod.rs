//! Operating the daemon: what it counts and what it says of itself.
//!
//! [`metrics`] are the counters that every stage increments, scraped at `/metrics`; [`status`] is `/api/status` and `edge status`; [`audit`] and [`log`] write
//! what happened; [`systemd`] tells the service manager; [`model_store`] keeps the models. Nothing here holds patient data.

pub(crate) mod audit;
pub(crate) mod board;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod model_store;
pub(crate) mod status;
pub(crate) mod systemd;
