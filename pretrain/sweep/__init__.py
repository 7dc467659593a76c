"""The runs of a sweep, trained one after another or several at once on this machine."""
