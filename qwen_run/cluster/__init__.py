"""An engine on several machines: Ray starts and watches its processes, the bits of an answer stay the same."""
