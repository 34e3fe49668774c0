"""What every role process is given: its context, its line to the broker, its heartbeat, its activity and its device."""
