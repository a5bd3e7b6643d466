//! Operating the daemon: what it counts and what it says of itself.
//!
//! [`metrics`] are the counters that every stage increments, [`exposition`] their text at `/metrics`; [`status`] is `/api/status` and `edge status`; [`audit`] and [`log`] write
//! what happened; [`systemd`] tells the service manager; [`model_store`] keeps the models. An operator's commands ([`command`]) are [`ask`] (`edge status`), [`doctor`],
//! [`ping`], [`demo`], [`model_command`] and [`generate`]; [`board`] is what the machine says of itself; [`watch`] follows
//! the running node for the audit log, [`visitors`] its peers. Nothing here holds patient data.

pub(crate) mod ask;
pub(crate) mod audit;
pub(crate) mod board;
pub(crate) mod command;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod exposition;
pub(crate) mod generate;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod model_command;
pub(crate) mod model_store;
pub(crate) mod ping;
pub(crate) mod status;
pub(crate) mod systemd;
pub(crate) mod visitors;
pub(crate) mod watch;

use std::io::Write;

use crate::exit::{Exit, Failure};
use command::OperateCommand;

/// An operator's command.
///
/// # Errors
/// As each of them says.
pub(crate) fn run(command: &OperateCommand, out: &mut impl Write) -> Result<Exit, Failure> {
    match command {
        OperateCommand::Status(arguments) => ask::run(arguments, out),
        OperateCommand::Doctor(arguments) => doctor::run(arguments, out),
        OperateCommand::Ping(arguments) => ping::run(arguments, out),
        OperateCommand::Demo(arguments) => demo::run(arguments, out),
        OperateCommand::Model(command) => model_command::run(command, out),
        OperateCommand::Generate(command) => generate::run(command, out),
    }
}
