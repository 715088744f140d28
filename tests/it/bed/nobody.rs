//! Job: ports at which nobody listens, while other tests start processes and take ports.
//! Input: none, or a listener that shall hear no more. Output: an address that refuses.
//! Always true: what only closes a listener does not do: a process that is being started has a copy of it for some milliseconds,
//! and a free port may be given to another. So a port is kept without listening, and a listener is shut down for all who hold it.

use socket2::{Domain, SockRef, Socket, Type};
use std::net::{Shutdown, SocketAddr, TcpListener};

/// A port of loopback that is taken, and at which nobody listens.
pub struct Nobody {
    _kept: Socket,
    pub address: SocketAddr,
}

impl Nobody {
    pub fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        Self { _kept: socket, address }
    }
}

/// `listener` hears no more, whoever else holds a copy of it; its port is kept as long as it lives.
pub fn hush(listener: &TcpListener) {
    SockRef::from(listener).shutdown(Shutdown::Both).unwrap();
}
