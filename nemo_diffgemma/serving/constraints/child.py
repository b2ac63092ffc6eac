"""The child process of `compiler.py`: makes and compiles languages, and checks texts, until it is left.

python -P -m nemo_diffgemma.serving.constraints.child FILE_DESCRIPTOR

Nothing imports this module: Python warns of one that is there already when it is to be run.
"""

from __future__ import annotations

import resource
import sys
from multiprocessing.connection import Connection

from nemo_diffgemma.cli.child_process import end_with_parent
from nemo_diffgemma.serving.constraints.errors import ConstraintError, ConstraintViolation
from nemo_diffgemma.serving.constraints.worker import Worker
from nemo_diffgemma.serving.failures import Failure


def main() -> None:
    end_with_parent()
    connection = Connection(int(sys.argv[1]))
    try:
        vocabulary, limits = connection.recv()
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        worker = Worker(vocabulary, limits)
        connection.send(None)
        while True:
            job, *arguments = connection.recv()
            try:
                result = getattr(worker, job)(*arguments)
            except (ConstraintError, ConstraintViolation, Failure) as error:
                result = error
            except (MemoryError, RecursionError) as error:
                result = ConstraintError(f"the constraint is too large to be compiled ({type(error).__name__})")
            except Exception as error:  # of a library: one constraint is refused, and the next one is still to come
                result = ConstraintError(f"the constraint cannot be used ({type(error).__name__}: {error})")
            connection.send(result)
    except (EOFError, BrokenPipeError):  # nobody is there any more
        return


if __name__ == "__main__":
    main()
