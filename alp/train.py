"""The loop: roll out, score, centre, update, record.

Parts of textbook PPO/GRPO that are left out, and why:
- a value network and GAE: a group's mean reward is the baseline, and rewards come at the end;
- the old policy's forward: ALP and Bypass divide by the sampler's probabilities; only GRPO-like methods recompute;
- several epochs over a batch: minibatches and lag already make the data stale;
- a KL penalty to a reference model: runs are short, and the reward is verified, not modelled;
- a learning-rate schedule and early stopping: neither has proved useful yet.

P prompts, G samples per prompt; a step is one rollout batch and `minibatches` optimiser steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alp_kernels import Stats
from alp_kernels.loss.inputs import is_known

from .advantage import centre
from .config import TrainConfig
from .errors import Diverged, UserError
from .measures.accuracy import evaluate
from .measures.causes import diagnose
from .measures.clean import clean_metrics, clean_stats
from .measures.mismatch import describe, measure_mismatch
from .measures.step import rollout_metrics, step_kl
from .policy.adapters import snapshot
from .policy.models import Policy
from .ranks.shard import PlainCopy, shard
from .ranks.world import World
from .rollout import Completions, MakeSampler, Request, uniforms
from .runs.files import Metrics
from .runs.folder import Run, create_run
from .runs.progress import Reporter, in_short, outcome
from .runs.signals import Stopped, StopRequest
from .runs.state import put_state, take_state
from .tasks.task import Problem, Score, Task, new_tokens
from .update import Experience, StepResult, Updater


class Clock:
    """Measures the seconds of each phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[f"{phase}_s"] = self.seconds.get(f"{phase}_s", 0.0) + time.monotonic() - start


class Trainer:
    """A run's state, and the code of one step. Uses task and sampler only through their protocols."""

    def __init__(
        self, config: TrainConfig, world: World, policy: Policy, task: Task, make_sampler: MakeSampler
    ) -> None:
        self.config, self.world, self.policy, self.task = config, world, policy, task
        self.make_sampler = make_sampler
        self.max_new_tokens = new_tokens(config, policy, task)
        rollout = config.rollout
        if config.compute_dtype and rollout.path == "same":
            rollout = dataclasses.replace(rollout, path="bf16")  # the training path then computes in bfloat16
        self.sampler = make_sampler(policy.model, rollout)
        self.plain: PlainCopy | None = None
        if config.parallel == "fsdp" and world.size > 1:  # after the sampler has copied the whole model
            compute_dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else None
            self.plain = PlainCopy(policy.model, compute_dtype, world)
            shard(policy.model, compute_dtype, world)
            self.sampler.restore([snapshot(policy.model)])
        self.updater = Updater(policy.model, config.update, config.rollout.temperature, config.seed, world)
        self.before: dict[str, float] = {}
        self.num_steps = 0
        self._evaluated: tuple[int, dict[str, float]] | None = None  # step and accuracies of the last evaluation

    def step(self) -> Metrics:
        """Run one rollout batch and its optimiser steps; returns the metrics to record."""
        clock, start = Clock(), time.monotonic()
        with clock("rollout"):
            problems = self.problems()
            completions = self.roll_out(problems)
        if self.world.max(int(not is_known(completions.logp).all())):
            raise Diverged(f"step {self.num_steps}: log-probabilities of the rollouts are not finite; lower update.lr")
        with clock("score"):
            scores = self.score(problems, completions)
        with clock("update"):
            experience = self.centre(completions, scores)
            self.updater.match(experience)
        with clock("diagnose"):
            metrics = self.diagnose(experience) | self.measure(experience)
        with clock("update"):
            results = self.update(experience)
        with clock("diagnose"):
            metrics |= self.measure_change(experience)
        with clock("push"):
            self.sampler.push(self.policy.model)
        self.num_steps += 1
        seconds = clock.seconds | {"step_s": time.monotonic() - start}
        return {"step": self.num_steps} | self.report(completions, scores, results) | metrics | seconds

    # -------------------------------------------------------------- roll out, score, centre, update

    @property
    def prompt_ids(self) -> list[int]:
        """Indices of this rank's prompts in the whole batch: its share of each minibatch in turn."""
        return self.world.share(self.config.rollout.prompts, self.config.update.minibatches)

    def problems(self) -> list[Problem]:
        """This rank's problems for this step."""
        first = self.num_steps * self.config.rollout.prompts
        return [self.task.problem("train", first + i) for i in self.prompt_ids]

    def roll_out(self, problems: list[Problem]) -> Completions:
        """Sample G completions of each of this rank's prompts."""
        rollout = self.config.rollout
        u = uniforms(rollout.prompts * rollout.samples, self.max_new_tokens, self.config.seed, self.num_steps)
        request = Request(
            [self.policy.encode_prompt(problem.question) for problem in problems],
            rollout.samples,
            self.max_new_tokens,
            u=u.view(rollout.prompts, rollout.samples, -1)[self.prompt_ids].flatten(0, 1),
            **rollout.distribution,
        )
        return self.task.roll_out(self.sampler.sample, self.policy, request)

    def score(self, problems: list[Problem], completions: Completions) -> list[Score]:
        num_samples = self.config.rollout.samples
        return [problems[i // num_samples].score(text) for i, text in enumerate(completions.texts)]

    def centre(self, completions: Completions, scores: list[Score]) -> Experience:
        """Compute advantages and, if a method or measurement needs them, log-probabilities before the updates."""
        config, device = self.config, self.world.device
        num_samples = config.rollout.samples
        rewards_PG = torch.tensor([score.reward for score in scores], device=device).view(-1, num_samples)
        groups = torch.tensor(self.prompt_ids, device=device)[:, None] * num_samples
        if config.tools.void == "exclude":
            completions = completions.without_void()
        experience = Experience(
            completions,
            advantages=centre(rewards_PG, config.update.normalise_std).flatten(),
            sample_ids=(groups + torch.arange(num_samples, device=device)).flatten(),
            old_logp=None,
        )
        if self.updater.method.needs_old_logp or config.measure_clean or config.measure_step_kl:
            experience = dataclasses.replace(experience, old_logp=self.updater.logp(experience))
        return experience

    def update(self, experience: Experience) -> list[StepResult]:
        """Take the batch's optimiser steps, one per minibatch."""
        num_minibatches = self.config.update.minibatches
        minibatches = experience.split(len(experience.advantages) // num_minibatches)
        first = self.num_steps * num_minibatches
        return [self.updater.step(first + i, minibatch) for i, minibatch in enumerate(minibatches)]

    # -------------------------------------------------------------- what a step reports

    def diagnose(self, experience: Experience) -> Metrics:
        """Every `diagnose_every` steps, measure mismatch, staleness and perturbation shift separately."""
        if not self.diagnoses_now:
            return {}
        return diagnose(self.updater, self.sampler.weights, experience, self.world)

    def measure(self, experience: Experience) -> Metrics:
        """With `measure_clean`, compare the unperturbed policy with the sampler at every step."""
        return clean_metrics(clean_stats(experience), self.diagnoses_now) if self.config.measure_clean else {}

    def measure_change(self, experience: Experience) -> Metrics:
        """With `measure_step_kl`, measure at every step how far the updates moved the policy."""
        if not self.config.measure_step_kl:
            return {}
        assert experience.old_logp is not None
        after = self.updater.logp(experience)
        return {"step_kl": step_kl(experience.old_logp, after, experience.completions.mask, self.world)}

    @property
    def diagnoses_now(self) -> bool:
        every = self.config.diagnose_every
        return every > 0 and self.num_steps % every == 0

    def report(self, completions: Completions, scores: list[Score], results: list[StepResult]) -> Metrics:
        """The step's metrics over all ranks: loss, gradient norm, ratio statistics, rewards, noise and memory."""
        (loss,) = self.world.sum([float(sum(result.loss for result in results))])
        stats = Stats.cat([result.stats for result in results]).gather()
        grad_norms = torch.stack([result.grad_norm for result in results])
        metrics = rollout_metrics(completions, scores, self.world) | {
            "loss": loss / len(results),
            "grad_norm": float(grad_norms.mean()),
            "grad_norm_max": float(grad_norms.max()),
        }
        metrics |= stats.summary()
        handle = self.updater.handle
        if handle is not None:
            metrics |= {"sigma": handle.sigma.tolist(), "realised_noise": handle.realised()["rms_over_nominal"]}
        metrics["peak_mib"] = self.world.peak_mib()
        every = self.config.diagnose_every
        if every and (self.num_steps - 1) % every == 0:
            metrics["envelope"] = stats.envelope()
        return metrics

    # -------------------------------------------------------------- outcome and state

    def make_whole(self) -> None:
        """Gather a sharded model on rank 0. Call it on every rank before `evaluate` and `save`, which run on rank 0."""
        if self.plain is not None:
            self.plain.fill(self.policy.model)

    def save(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        (self.policy if self.plain is None else self.policy._replace(model=self.plain.model)).save(folder)

    def measure_mismatch(self) -> dict[str, float]:
        """Compare the sampler with the training path at equal weights. Every rank computes the same result."""
        return measure_mismatch(
            self.sampler,
            self.policy,
            self.task,
            self.config.rollout,
            max_new_tokens=self.max_new_tokens,
            seed=self.config.seed,
            micro_batch=self.config.update.micro_batch,
        )

    def evaluate_now(self) -> Metrics:
        """Every `eval_every` steps, return accuracies as eval/NAME."""
        return {f"eval/{name}": value for name, value in self.evaluate().items()} if self.evaluates_now else {}

    @property
    def evaluates_now(self) -> bool:
        every = self.config.eval_every
        return every > 0 and self.num_steps % every == 0

    def evaluate(self) -> dict[str, float]:
        """Measure the current policy's accuracies, at most once per step."""
        if self._evaluated is None or self._evaluated[0] != self.num_steps:
            report = evaluate(
                self.policy if self.plain is None else self.policy._replace(model=self.plain.as_computed()),
                self.task,
                self.make_sampler,
                self.config.rollout,
                num_problems=self.config.eval_prompts,
                max_new_tokens=self.max_new_tokens,
                seed=self.config.seed,
            )
            self._evaluated = (self.num_steps, report)
        return self._evaluated[1]

    def state(self) -> dict[str, Any]:
        """Return everything a resumed run needs; a collective call."""
        updater = self.updater
        state = take_state(self.policy.model, updater.optimiser, updater.handle, self.sampler, self.world)
        return {"num_steps": self.num_steps, "before": self.before, **state}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from rank 0's `state`."""
        self.num_steps, self.before = state["num_steps"], state["before"]
        updater = self.updater
        put_state(state, self.policy.model, updater.optimiser, updater.handle, self.sampler, self.world)


def train(config: TrainConfig, resume: Path | None = None, *, with_plots: bool = True) -> Path:
    """Start or resume a training run; returns its folder."""
    start = time.monotonic()
    if resume is not None:
        config = TrainConfig.load(resume / "config.json", to_resume=True)
    world = World(config.device)
    if config.compute_dtype and world.size == 1:
        raise UserError(
            f"compute_dtype={config.compute_dtype!r}; it needs several processes under torchrun: one process does not shard"
        )
    if config.rollout.prompts % (config.update.minibatches * world.size):
        raise UserError(
            f"rollout.prompts={config.rollout.prompts}; it needs a multiple of update.minibatches="
            f"{config.update.minibatches} times the number of processes, {world.size}"
        )
    try:
        trainer, run = _begin(config, resume, world)
        _loop(trainer, run)
        _finish(trainer, run, start, with_plots)
        return run.folder
    finally:
        world.close()


def _begin(config: TrainConfig, resume: Path | None, world: World) -> tuple[Trainer, Run]:
    """Set up a run before its first step, or restore it from its newest checkpoint."""
    from .setup import make_policy, make_sampler, make_task, with_tools  # the rest of this module uses only protocols

    task = with_tools(make_task(config.task, config.seed), config)
    # create the folder before the warm-up: a taken name fails at once, and a run killed in the warm-up can be resumed
    folder = resume or Path(world.broadcast(str(create_run(config)) if world.is_main else None))
    run = Run(folder)
    is_sharded = config.parallel == "fsdp" and world.size > 1  # each rank then reads only its shards
    checkpoint = run.load_checkpoint(torch.device("cpu") if is_sharded else world.device, mmap=is_sharded)
    policy = make_policy(config, task, world, is_resumed=checkpoint is not None)
    torch.manual_seed(config.seed + world.rank)  # a model's dropout, if it has any, differs between the ranks
    trainer = Trainer(config, world, policy, task, make_sampler)
    if checkpoint is not None:
        trainer.load_state(checkpoint)
    else:
        mismatch = trainer.measure_mismatch()
        trainer.make_whole()
        if world.is_main:
            run.save_mismatch(mismatch)
            print(describe(mismatch, config.rollout), flush=True)
            trainer.before = trainer.evaluate()
            run.save_before(trainer.before)
    if world.is_main:
        run.tidy()
        run.keep_metrics(trainer.num_steps)
        print(f"run folder: {run.folder}", flush=True)
    world.barrier()
    return trainer, run


def _loop(trainer: Trainer, run: Run) -> None:
    """Run the steps, record metrics, save checkpoints; raises Stopped after the step in which a signal came."""
    config, world = trainer.config, trainer.world
    reporter = Reporter("train", config.steps, start=trainer.num_steps, quiet=not world.is_main)
    with StopRequest(quiet=not world.is_main) as request, reporter as progress:
        while trainer.num_steps < config.steps:
            metrics = trainer.step()
            if trainer.evaluates_now:
                trainer.make_whole()
            if world.is_main:
                evaluated = trainer.evaluate_now()
                run.record(metrics | evaluated)
                if evaluated:
                    run.keep_best(trainer.num_steps, evaluated["eval/train"], trainer.save)
            signum = world.max(request.signum)  # every rank stops after the same step
            if trainer.num_steps % config.checkpoint_every == 0 or trainer.num_steps == config.steps or signum:
                state = trainer.state()
                if world.is_main:
                    run.save_checkpoint(trainer.num_steps, state)
            progress(trainer.num_steps, in_short(metrics))
            if signum:
                world.barrier()  # write the checkpoint before a launcher sees any rank exit
                line = f"stopped after step {trainer.num_steps}; continue with alp train --resume {run.folder}"
                raise Stopped(signum, line if world.is_main else "")


def _finish(trainer: Trainer, run: Run, start: float, with_plots: bool) -> None:
    """Evaluate and save the model, write the outcome and the plots, print a summary."""
    world = trainer.world
    trainer.make_whole()
    if world.is_main:
        after = trainer.evaluate()
        run.save_model(trainer.save)
        run.save_outcome(trainer.before, after)
        if with_plots:
            from .runs.plots import save_plots

            save_plots(run.folder.name, run.metrics, run.folder / "plots")
        run.close()
        path, seconds = trainer.config.rollout.path, time.monotonic() - start
        print(f"learned in {seconds:.0f} s: {outcome(trainer.before, after, run.metrics, path)}; ", end="")
        print(f"see {run.folder} (alp report {run.folder})", flush=True)
    world.barrier()
