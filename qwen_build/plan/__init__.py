"""What was asked for, and which linear is stored how."""
