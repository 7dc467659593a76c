"""Audits of a run: an interval is trained again, and its figures compared with those that the run recorded."""
