//! The command line and the node beside a CT console: DICOM in, a probability of pulmonary embolism out. Research use only.
//!
//! The stages in the order the data meets them. [`serve`], set by [`config`], runs the node: [`intake`] takes objects in over the network, [`decide`]
//! analyses them and judges studies, [`send`] tells the PACS and others, [`commitment`] says who keeps what was stored, [`page`] shows people, [`operate`] serves
//! who looks after it; a fault in a part that is [`vital`] ends it. [`classify`] does the same for files that [`walk`] finds, and [`report`] prints.
//!
//! Both have foreign bytes parsed by a [`worker`] process (behind its [`confinement`], kept by the [`supervisor`] with [`launch`] and [`watchdog`];
//! [`wire`] is what passes between them), run the [`model`] on the tensors that come back, let [`series`] assemble slices and choose the series that is
//! judged, and [`study`] judge it; [`result`] is what is known then. [`tensor_file`] and [`heatmap`] write what is asked for beside; [`bench`] measures;
//! [`cli`] and [`exit`] are the outside.
#![forbid(unsafe_code)]

mod bench;
mod classify;
mod cli;
mod commitment;
mod config;
mod confinement;
mod decide;
mod exit;
mod heatmap;
mod intake;
mod launch;
mod model;
mod operate;
mod page;
mod report;
mod result;
mod send;
mod series;
mod serve;
mod study;
mod supervisor;
mod tensor_file;
mod vital;
mod walk;
mod watchdog;
mod wire;
mod worker;

use std::io::{self, BufWriter, ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = BufWriter::new(io::stdout());
    let done = match &cli.command {
        Command::Classify(arguments) => classify::run(arguments, &mut out),
        Command::Bench(arguments) => bench::run(arguments, &mut out),
        Command::Report(arguments) => send::export::run(arguments, &mut out),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(arguments) => serve::check(arguments, &mut out),
        Command::Config(command) => serve::config(command, &mut out),
        Command::Operate(command) => operate::run(command, &mut out),
        Command::Worker => return worker::run(),
    };
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            let is_reader_gone = failure
                .error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe);
            if !is_reader_gone {
                // Where standard error is gone too, the exit code is all that is left.
                drop(writeln!(io::stderr(), "edge: {failure}"));
            }
            failure.exit.into()
        }
    }
}
