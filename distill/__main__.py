"""The one way in: `codistill job=... experiment=...`, the same as `python -m distill`."""

import os
import sys

from distill.config import stop

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "codistill":
    stop.listen()  # the imports below take half a second

import contextlib
import gc
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill import __version__
from distill.config import owner
from distill.config import streams as console
from distill.config.errors import ConfigError, UserError, print_error
from distill.config.load import CONF, load, precheck
from distill.config.registry import JOBS, Job
from distill.config.schema import RunConfig
from distill.config.sentences import sentence
from distill.engine import cores


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def compose_and_run(cfg: DictConfig) -> None:
    try:
        run_job(load(cfg))
    except (UserError, OSError) as error:
        sys.exit(print_error(error))  # not raised: Hydra would print the whole command line
    except Exception:  # a fault of the program; what reaches main is Hydra's, and a fault of the command line
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        owner.release_all()


def run_job(config: RunConfig) -> None:
    job = JOBS[config.job]
    refusal: UserError | None = owner.OwnRunFolder.refusal
    folder, alone = Path(HydraConfig.get().runtime.output_dir), int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        if int(os.environ.get("RANK", "0")) == 0 and refusal is None:
            owner.own(folder, "hydra.run.dir", f"job={config.job}")
    except UserError as error:
        refusal = error
    if alone and refusal is not None:
        raise refusal
    stop.check()
    # Before the first job of a sweep alone: torch reads the number of threads when it is loaded.
    if alone and "torch" not in sys.modules and (message := cores.settle(config.engine.threads)):
        print(message, file=sys.stderr)
    # Imported only now: problems of a configuration are printed before torch and DeepSpeed are loaded.
    from distill.engine import dist

    ranks = dist.start(config.engine)
    # Each rank composes its own time stamp; the main rank's folder is the run's.
    refusal, folder = ranks.from_main((refusal, folder))
    if refusal is not None:
        ranks.barrier()  # no rank ends before all have received it
        raise refusal
    try:
        stop.check()
        job.run(config, folder, ranks)
    except stop.Stopped as stopped:
        if ranks.is_main:
            print(f"{stopped.word}: {_remains(job, folder)}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except Exception:
        if alone or (number := stop.asked()) is None:
            raise
        # Another rank was stopped first: the exception is that of a collective which it left.
        sys.exit(stop.EXIT_CODES[number])


def _remains(job: Job, folder: Path) -> str:
    """A sentence about the checkpoint, or other work, that the run can go on from."""
    from distill.engine import checkpoint

    again = f"the same command with hydra.run.dir={folder} resume=true"
    if not (folder / "config.yaml").exists():
        return "nothing was begun; the same command starts it"
    places = [folder / "checkpoints", *(folder / "arms").glob("*/checkpoints")]
    newest = [last for place in places if (last := checkpoint.last(place)) is not None]
    if newest:
        return f"{max(newest, key=lambda path: path.stat().st_mtime)} remains; {again} goes on from it"
    return job.remains.format(again=again)


def main() -> int:
    """Returns the exit code; a problem that a user can remedy is one line, a fault of the program a traceback."""
    with console.spared(), stop.signals():
        try:
            return _main()
        except stop.Stopped as stopped:
            print(f"{stopped.word}: nothing was begun; the same command starts it", file=sys.stderr)
            return stopped.exit_code
        finally:
            owner.release_all()
            if "triton" not in sys.modules:  # its binding prints what it calls leaks
                gc.freeze()  # else Python collects the garbage of torch and DeepSpeed once more, for seconds


def _main() -> int:
    try:
        sys.argv[1:] = precheck(sys.argv[1:])
    except UserError as error:
        return print_error(error)
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(f"codistill {__version__}")
        return 0
    stop.check()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints what it raises
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) > 0:
            # Or each rank would leave empty folders with its own time stamp.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            sys.argv += ["hydra.run.dir=.", f"hydra.sweep.dir='{scratch}'"]
        try:
            compose_and_run()
        except OSError as error:  # Hydra makes the run folder before it calls us
            return print_error(error)
        except Exception as error:
            return print_error(ConfigError(sentence(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
