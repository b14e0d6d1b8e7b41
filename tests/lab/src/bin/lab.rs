//! `lab`: the lab's own checks and the named real-peer scenarios.

use clap::{Parser, Subcommand};
use lab::Error;
use lab::interop::{self, Lab, Lane};
use lab::run::Run;
use lab::tandem::Bins;
use std::path::{Path, PathBuf};
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
    /// Plays named scenarios against a real strongSwan; a line for each, then `N passed, N failed`.
    Interop {
        /// Parts of names [default: all]
        names: Vec<String>,
        /// List the scenarios
        #[arg(long)]
        list: bool,
        /// Full counts and lengths, as the bars want them
        #[arg(long)]
        full: bool,
        /// Only this part of them: the first two may be played side by side
        #[arg(long)]
        lane: Option<Lane>,
        /// Where tandemd and tandem are [default: beside this program]
        #[arg(long)]
        bin_dir: Option<PathBuf>,
    },
    /// Removes what earlier runs left behind: namespaces of killed ones, files of failed ones.
    Cleanup,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.what {
        What::Baseline => prove(lab::baseline::prove),
        What::Kernel => prove(lab::baseline::prove_kernel),
        What::Interop { list: true, .. } => {
            for scenario in interop::all() {
                println!("{:<28} {}", scenario.name, scenario.about);
            }
            Ok(())
        }
        What::Interop { names, full, lane, bin_dir, .. } => {
            play(&names, full, lane, bin_dir.as_deref())
        }
        What::Cleanup => {
            lab::run::forget_kept_files();
            lab::run::clean_stale().map(|count| println!("{count} stale namespaces removed"))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A proof tells each step to the closure.
type Proof = fn(&Run, &mut dyn FnMut(&str)) -> lab::Result<()>;

fn prove(what: Proof) -> lab::Result<()> {
    let run = Run::start(Some(Duration::from_secs(180)))?;
    let result = what(&run, &mut |line| println!("  {line}"));
    if result.is_err() {
        run.keep_files();
    }
    result
}

fn play(
    names: &[String],
    full: bool,
    lane: Option<Lane>,
    bin_dir: Option<&Path>,
) -> lab::Result<()> {
    let bins = Bins::find(bin_dir)?;
    let bound = if full { 3 * 3600 } else { 1800 };
    let run = Run::start(Some(Duration::from_secs(bound)))?;
    match interop::run(&Lab { run: &run, bins: &bins, full }, names, lane) {
        Some(0) => Ok(()),
        Some(failed) => Err(Error::check(format!("{failed} scenarios failed"))),
        None => Err(Error::check("no scenario has such a name (lab interop --list)")),
    }
}
