//! Job: completions for shells, and man pages, from the definitions that the command line is parsed by.
//! Input: a shell; a folder. Output: a script on standard output; a page for each command.
//! Edge: writes files.
//! Always true: a command or an option that is added is in both.

use super::{Cli, Failure, say};
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;

pub(super) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "etcd-ferry", &mut script);
    say(String::from_utf8_lossy(&script).trim_end())
}

pub(super) fn man(folder: &Path) -> Result<(), Failure> {
    let unwritten = |e: std::io::Error| {
        let shown = folder.display();
        Failure::Failed(format!("the pages cannot be written to {shown} ({e}): give a folder that you may write to"))
    };
    std::fs::create_dir_all(folder).map_err(unwritten)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(unwritten)?;
    say(&format!("made the man pages in {}; read one with `man -l {0}/etcd-ferry.1`", folder.display()))
}
