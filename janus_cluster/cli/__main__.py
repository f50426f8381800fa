"""`python -m janus_cluster.cli` is `janus-cluster`."""

from janus_cluster.cli.main import main

main()
