"""trio: sockets, processes, disk and service manager around the pure cores."""
