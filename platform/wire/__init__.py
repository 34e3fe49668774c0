"""Messages, frames, sockets and keys between the roles."""
