"""Documents -> packed rows, one window at a time, in worker processes."""
