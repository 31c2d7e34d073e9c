"""One serving process of a receiver with several. Started by ``server`` only; not a command of its own."""

import sys

from fastship.receiver.server import worker_main

if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:]))
