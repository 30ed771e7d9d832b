"""One run: its session, start, samples, evaluations, control arms and command line."""
