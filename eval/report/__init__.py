"""The report on sparse attention methods: pictures and tables from the JSON lines of `tactic eval paper`, `trace` and `kl`."""
