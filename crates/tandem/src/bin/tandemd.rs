//! The Tandem daemon: see [`tandem::daemon`].

fn main() -> std::process::ExitCode {
    tandem::daemon::main()
}
