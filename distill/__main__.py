"""The one way in: `python -m distill job=... experiment=...`."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill.config.errors import ConfigError, UserError
from distill.config.load import CONF, load, precheck
from distill.config.schema import Job, RunConfig
from distill.config.sentences import sentence


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def compose_and_run(cfg: DictConfig) -> None:
    try:
        run_job(load(cfg))
    except (UserError, OSError) as error:
        # Here, not only in main: on its way there Hydra would print the whole command line.
        sys.exit(_told(error))
    except Exception:  # a mistake of ours; what reaches main is Hydra's, and a mistake of the command line
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run_job(config: RunConfig) -> None:
    # Imported only now: a wrong configuration must be told before torch and DeepSpeed are loaded.
    from distill.engine import dist
    from distill.run import backfill, codistill, export, student, teacher
    from distill.run.run import Run

    ranks = dist.start(config.engine)
    # Each rank composes its own time stamp; the main rank's folder is the run's.
    folder = Path(ranks.from_main(HydraConfig.get().runtime.output_dir))
    if config.job is Job.export:
        export.export(config, folder, ranks)
        return
    run = Run(config, folder, ranks)
    if run.finished:
        print(f"{folder}: finished; nothing to resume")
        return
    jobs = {
        Job.teacher: teacher.train,
        Job.student: student.train,
        Job.codistill: codistill.train,
        Job.backfill: backfill.backfill,
        Job.evaluate: student.evaluate,
    }
    jobs[config.job](run)


def main() -> int:
    """The error's exit code and one line per fault for what a person can mend; tracebacks are for our own mistakes."""
    try:
        sys.argv[1:] = precheck(sys.argv[1:])
    except UserError as error:
        return _told(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints what it raises
    if os.environ.get("RANK", "0") != "0":
        sys.argv.append("hydra.run.dir=.")  # or each rank would leave an empty folder with its own time stamp
    try:
        compose_and_run()
    except OSError as error:  # Hydra makes the run folder before it calls us
        return _told(error)
    except Exception as error:
        return _told(ConfigError(sentence(error)))
    return 0


def _told(error: UserError | OSError) -> int:
    if isinstance(error, OSError) and not (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        raise error  # nothing that a person could mend: the traceback is for us
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return error.exit_code if isinstance(error, UserError) else 2


if __name__ == "__main__":
    sys.exit(main())
