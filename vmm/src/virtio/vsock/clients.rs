//! Clients: who they want, and what their sockets are ready for.

use std::io;
use std::os::unix::net::UnixListener;

use super::connection::{Connection, Fate, Phase};
use super::packet::{Header, Operation, Ports};
use super::{
    ACCEPTED_AT_ONCE, CONNECTIONS_MAX, ConnectionId, FIRST_CLIENT_PORT, PENDING_MAX, Vsock, add,
};

/// From the host.
impl Vsock {
    /// Lets clients in.
    pub(super) fn accept(&mut self) {
        for _ in 0..ACCEPTED_AT_ONCE {
            let socket = match self.listener.as_ref().map(UnixListener::accept) {
                Some(Ok((socket, _))) => socket,
                Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    // No descriptor is left: not before one of ours is closed.
                    self.accepts = false;
                    return;
                }
                _ => return,
            };
            let is_client =
                |it: &Connection| it.is_greeting() || it.ports.host >= FIRST_CLIENT_PORT;
            let clients = self.connections.values().filter(|it| is_client(it)).count();
            let pending = |it: &Connection| it.phase != Phase::Open;
            let waiting = self.connections.values().filter(|it| pending(it)).count();
            if waiting >= PENDING_MAX || clients >= CONNECTIONS_MAX {
                let mut all = self.connections.iter();
                let oldest = all.find(|(_, it)| pending(it)).map(|(id, it)| {
                    let asked = it.phase == Phase::Asked;
                    (*id, if asked { Fate::Reset } else { Fate::Gone })
                });
                // With none that waits the newcomer is turned away.
                let Some((id, fate)) = oldest else { continue };
                self.settle(id, fate);
            }
            if socket.set_nonblocking(true).is_ok() {
                self.add(Connection::greeting(socket));
            }
        }
    }

    pub(super) fn socket_ready(&mut self, id: ConnectionId) {
        let fate = self.with(id, |connection| {
            if connection.wants_to_write() {
                match connection.flush() {
                    Fate::Lives => {}
                    other => return other,
                }
            }
            if connection.wants_to_read() && !connection.is_greeting() {
                connection.readable = true;
            }
            Fate::Lives
        });
        self.settle(id, fate);
        let greeting = self.connections.get_mut(&id).map(Connection::greet);
        match greeting {
            Some(Ok(Some(port))) => {
                let host = self.free_port();
                let ports = Ports { host, guest: port };
                self.with(id, |connection| {
                    connection.ask(ports);
                    Fate::Lives
                });
            }
            Some(Err(fate)) => self.settle(id, fate),
            _ => {}
        }
    }

    pub(super) fn with(
        &mut self,
        id: ConnectionId,
        act: impl FnOnce(&mut Connection) -> Fate,
    ) -> Fate {
        self.connections.get_mut(&id).map_or(Fate::Gone, act)
    }

    pub(super) fn add(&mut self, connection: Connection) {
        self.last_id += 1;
        self.connections.insert(self.last_id, connection);
        add(&self.counts.connections, 1);
    }

    pub(super) fn settle(&mut self, id: ConnectionId, fate: Fate) {
        if fate == Fate::Lives {
            return;
        }
        self.accepts = true;
        if let Some(connection) = self.connections.remove(&id)
            && fate == Fate::Reset
        {
            let reset = Header::new(connection.ports, Operation::Reset);
            self.replies.push_back(reset);
        }
    }

    /// A port of the host that no connection has.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_CLIENT_PORT);
            if self.connections.values().all(|it| it.ports.host != port) {
                return port;
            }
        }
    }
}
