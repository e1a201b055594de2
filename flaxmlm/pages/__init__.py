"""HTML pages: one file that needs no network, no scripts and no fonts."""
