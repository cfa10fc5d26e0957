"""Values over time, of one series or of several, to forecast."""
