"""Messages, frames, sockets, keys and heartbeats between the roles."""
