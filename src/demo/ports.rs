//! Job: free ports for servers that must be told theirs, and that get it back after a restart.
//! Input: none. Output: a port of 127.0.0.1 that nobody listens on.
//! Always true: the port lies below the range that the kernel hands to outgoing connections, so a client that dials a server while it
//! is down can neither take its port nor connect to itself; and one process is never given the same port twice.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Above the well-known services, below Linux's default for outgoing connections (32768). What runs beside a demonstration takes others.
const PORTS: Range<u16> = 10_000..20_000;
const TRIES_MAX: usize = 1_000;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// Another process can still take the port before it is used: a server that then fails to bind deserves a second try.
pub fn free_port() -> io::Result<u16> {
    free_port_of(PORTS)
}

/// As [`free_port`], of these ports.
pub fn free_port_of(ports: Range<u16>) -> io::Result<u16> {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..TRIES_MAX {
        let port = rand::random_range(ports.clone());
        if !given.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            given.insert(port);
            return Ok(port);
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no free port between {} and {}", ports.start, ports.end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_free_and_given_once() {
        let ports: Vec<u16> = (0..50).map(|_| free_port().unwrap()).collect();
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 50);
        for port in ports {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        }
    }
}
