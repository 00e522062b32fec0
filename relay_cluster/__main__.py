"""`python -m relay_cluster` is `relay`."""

from relay_cluster.cli import main

if __name__ == "__main__":
    main()
