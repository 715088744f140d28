//! Job: ports at which nobody listens, while other tests start processes and take ports.
//! Input: none, or a listener that shall hear no more. Output: a port for a server; an address that refuses.
//! Always true: what only closes a listener does not do: a process that is being started has a copy of it for some milliseconds,
//! and a free port may be given to another. So a port is kept without listening, and a listener is shut down for all who hold it.

use etcd_ferry::demo::ports::free_port_of;
use socket2::{Domain, SockRef, Socket, Type};
use std::net::{Shutdown, SocketAddr, TcpListener};

/// For a server that must be told its port, and gets it back after a restart. No demonstration that runs beside the tests takes one of these.
pub fn free_port() -> u16 {
    free_port_of(20_000..32_000).expect("a free port")
}

/// As the standard library has it.
const BACKLOG: i32 = 128;

/// A port of loopback that is taken, and at which nobody listens.
pub struct Nobody {
    kept: Socket,
    pub address: SocketAddr,
}

impl Nobody {
    pub fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        Self { kept: socket, address }
    }

    /// Somebody listens there from now on.
    pub fn listen(self) -> TcpListener {
        self.kept.listen(BACKLOG).unwrap();
        self.kept.into()
    }
}

/// `listener` hears no more, whoever else holds a copy of it; its port is kept as long as it lives.
pub fn hush(listener: &TcpListener) {
    SockRef::from(listener).shutdown(Shutdown::Both).unwrap();
}
