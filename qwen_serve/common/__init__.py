"""What every part of the server speaks of: errors as clients read them, settings, events of a stream."""
