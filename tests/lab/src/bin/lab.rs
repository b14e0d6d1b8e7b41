//! `lab`: the lab's own checks and the named real-peer scenarios.

use clap::{Parser, Subcommand};
use lab::run::Run;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Network namespaces with real peers: the lab's checks and the interop scenarios")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The lab proves itself, strongSwan against strongSwan.
    Baseline,
    /// A real kernel's ESP in user-mode-linux, against strongSwan.
    Kernel,
    /// Removes what an earlier run that was killed left behind.
    Cleanup,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.what {
        What::Baseline => prove(lab::baseline::prove),
        What::Kernel => prove(lab::baseline::prove_kernel),
        What::Cleanup => lab::run::clean_stale().map(|count| println!("{count} stale namespaces removed")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prove(what: fn(&Run, &mut dyn FnMut(&str)) -> lab::Result<()>) -> lab::Result<()> {
    let run = Run::start(Some(Duration::from_secs(180)))?;
    let result = what(&run, &mut |line| println!("  {line}"));
    if result.is_err() {
        run.keep_files();
    }
    result
}
