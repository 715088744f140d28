//! Job: completions for shells, and man pages, from the definitions that the command line is parsed by.
//! Input: a shell; a folder. Output: a script on standard output; a page for each command.
//! Edge: writes files.
//! Always true: a command or an option that is added is in both.

use super::{Cli, Failure, say};
use crate::software;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::io;
use std::path::Path;

pub(super) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "etcd-ferry", &mut script);
    say(String::from_utf8_lossy(&script).trim_end())
}

pub(super) fn man(folder: &Path) -> Result<(), Failure> {
    let unwritten = |e: io::Error| {
        let shown = folder.display();
        Failure::Failed(format!("the pages cannot be written to {shown} ({e}): give a folder that you may write to"))
    };
    std::fs::create_dir_all(folder).map_err(unwritten)?;
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    pages(&program, folder).map_err(unwritten)?;
    say(&format!("made the man pages in {}; read one with `man -l {0}/etcd-ferry.1`", folder.display()))
}

/// One for each command; each is of the program's version, and in its manual.
fn pages(command: &Command, folder: &Path) -> io::Result<()> {
    let source = format!("etcd-ferry {}", software::SHORT);
    Man::new(command.clone()).source(source).manual("etcd-ferry").generate_to(folder)?;
    command.get_subcommands().try_for_each(|below| pages(below, folder))
}
