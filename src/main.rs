//! Job: the program: what the command line says, and its exit code.
//! Input: arguments. Output: see src/cli.
//! Always true: nothing is done here.

fn main() -> std::process::ExitCode {
    etcd_ferry::cli::run()
}
