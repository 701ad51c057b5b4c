"""Polynomial attention: sim = c0 + c1·s + c2·s² with s = scale·q·k."""
