"""What every command needs beyond the two scripts."""
