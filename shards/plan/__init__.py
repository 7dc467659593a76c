"""Which record is read where and when: pure functions of the record tables and the seed."""
