"""What `mixed` is made of."""
