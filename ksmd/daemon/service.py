"""The daemon: settings, the processes beside it, the pipeline, and who may ask it for what."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksmd.daemon import listening, notify, report
from ksmd.daemon.access import denied
from ksmd.daemon.adopt import Adoption
from ksmd.daemon.connection import Call, CallError
from ksmd.daemon.continuity import LedgerFile
from ksmd.daemon.control import ControlServer
from ksmd.daemon.guardian import Guardian
from ksmd.daemon.loop import Job, Loop
from ksmd.daemon.notify import Manager
from ksmd.daemon.pace import Pace
from ksmd.daemon.pipeline import AskedResult, Pipeline
from ksmd.daemon.programs import Programs
from ksmd.daemon.targets import Targets
from ksmd.daemon.tuning import ThreadInfo, Tuning
from ksmd.daemon.unguarded import Rescue
from ksmd.daemon.unmerger import UnmergeResult
from ksmd.guard import selftest
from ksmd.kernel import capabilities, memcg, procfs
from ksmd.kernel.features import probe
from ksmd.kernel.iouring import PinRing
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError
from ksmd.model.features import Feature
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT
from ksmd.remap.engine import Engine
from ksmd.settings.apart import Given, Reading
from ksmd.settings.values import Settings

log = logging.getLogger(__name__)

#: What the service manager is asked for, again and again while targets get their memory back.
_LEAVING_SECS = 60.0


class Service:
    """One running daemon. KernelFeatureError or PrivilegeError where it could not be safe."""

    def __init__(
        self,
        given: Given,
        config: Path | None,
        socket: Path,
        manager: Manager | None = None,
    ) -> None:
        self._given = given
        self._tuning = Tuning(given.settings, given.sources)
        self.manager = manager or Manager()
        self._config = config
        self._paused = False
        self._leaving = False
        # before any child but who reads settings, so that a second daemon disturbs nothing
        self.server = ControlServer(
            socket,
            self.dispatch,
            self._closed,
            inherited=listening.inherited(self.manager.inherited),
            mode=int(given.settings.socket_mode, 8),
            gid=listening.group_id(given.settings.socket_group),
        )
        self._engine = Engine()
        try:
            self._engine.begin()  # it loads while the guard is tested
            self.features = require_features()
            name = str(self.server.path.absolute())
            self._guardian = Guardian(name, self.manager.stored())
            self._start_helpers()
        except BaseException:
            self._engine.close()
            self.server.close()
            raise
        self._pager = self._guardian.pager
        sizes = given.settings.resolved_tables(memcg.available() >> PAGE_SHIFT)
        ring = PinRing()
        targets = Targets(given.settings, sizes, ring, self._pager, Path(f"{name}.folios"))
        self.pipeline = Pipeline(targets, self._engine, self._pager)
        self._know_ours()
        state = self.manager.state_directory
        self._counters = LedgerFile(state, self.pipeline.ledger, procfs.boot_id())
        self._counters.restore()
        self._budget = Pace()
        self.loop = Loop(
            self._background,
            self._may_scan,
            self._settled,
            targets.stirred,
            self._pace,
            self._housekeep,
            self._on_signal,
        )
        self.programs = Programs(self.pipeline, self.loop.turns, self.loop.selector)
        self.loop.serve(self.server)
        self._guardian.watch(self.loop.selector, self._pager_replaced)
        if self._guardian.adopted:
            adoption = Adoption(self.pipeline, self._pager, ring)
            adoption.restore()
            self._do("adopt", adoption.steps())
        self._rescue()

    def _do(self, name: str, steps: Iterator[float]) -> None:
        self.loop.add(Job(name, steps, lambda _: None, _nothing, _fail(None)))

    def _rescue(self) -> None:
        """Look for processes whose guard fell, and unmerge them."""
        self._do("rescue", Rescue(self.pipeline.targets, self._engine).steps())

    def _start_helpers(self) -> None:
        self._guardian.start()
        if self.manager.present:
            self._guardian.say_if_misnamed()
        self._engine.start()

    # -- life -------------------------------------------------------------------------------

    def run(self, early: Sequence[int] = ()) -> int:
        """Serve until told to stop; then unmerge, if the settings say so.

        *early*: signals that came before, to be heeded now.
        """
        self.loop.catch_signals(notify.SIGNALS)
        for number in early:
            self._on_signal(number)
        log.info("ready on %s", self.server.path)
        self.manager.ready()
        self.loop.run()
        self.manager.stopping()
        try:
            return self._leave()
        finally:
            self.server.close()
            self._engine.close()
            self._guardian.close()
            self.loop.close()
            self._counters.save()

    def _leave(self) -> int:
        """Unmerge on the way out (on_stop); what cannot be given back keeps its guard."""
        self.loop.give_up_jobs(KsmdError("ksmd is stopping"))
        if self._settings.on_stop == "keep":
            log.warning("stopping with on_stop: keep; merged memory stays guarded by the pager")
            return 0
        if self.manager.restarting(own_unit()):
            log.info("stopping for a restart; merged memory stays guarded by the pager")
            return 0
        failed: list[str] = []

        def done(result: UnmergeResult) -> None:
            if result.left:
                failed.append(f"{result.left} pages could not be given back: {result.reason}")

        def error(why: KsmdError) -> None:
            failed.append(f"{why} ({why.hint})" if why.hint else str(why))

        targets = list(self.pipeline.targets)
        self.loop.add(
            Job("unmerge", self.pipeline.unmerger.unmerge(targets), _last(done), _nothing, error)
        )
        self.loop.drain()
        for line in failed:
            log.error("%s", line)
        return 1 if failed else 0

    @property
    def _settings(self) -> Settings:
        return self.pipeline.targets.settings

    def _pager_replaced(self) -> None:
        self._know_ours()
        self._rescue()  # a child of whom it had not told us yet
        if self._guardian.awaited and self._pager.standing:
            log.info("the pager %d stands by: scanning goes on", self._pager.pid)
            self._paused = self._guardian.awaited = False
            self.loop.hurry()

    def _know_ours(self) -> None:
        """See that no rule selects a process of our own, for they are replaced when they die."""
        ours = self.pipeline.targets.ours
        ours.clear()
        ours.update((*self._ours, self._pager.shadow))

    def _may_scan(self) -> bool:
        something = self._settings.targets or len(self.programs.registry)
        return not self._paused and self._settings.run == "merge" and bool(something)

    def _pace(self) -> float:
        return self._budget.pause(self._settings.scan.cpu_percent, self._ours)

    @property
    def _ours(self) -> tuple[int, int, int]:
        return os.getpid(), self._pager.pid, self._engine.pid

    def _settled(self) -> bool:
        return self.pipeline.last is not None and self.pipeline.last.settled

    def _background(self) -> Iterator[float]:
        yield from self.pipeline.full_pass(asked=False)

    def _housekeep(self) -> None:
        self._pager.pump()
        self._guardian.look()
        self._know_ours()
        self._counters.keep()
        if self.pipeline.accounting.owes_memory and not (self.loop.busy or self._may_scan()):
            # no pass comes to try it again
            self._do("release", (0.0 for _ in self.pipeline.accounting.recount()))
        if self.manager.present:
            self._tell_manager()

    def _tell_manager(self) -> None:
        """Show the savings, and a sign of life: this runs only when a step has ended."""
        summary = report.summary(self.pipeline, self._paused)
        self.manager.status(f"stopping, {summary}" if self._leaving else summary)
        self.manager.alive()
        if self._leaving:
            self.manager.extend(_LEAVING_SECS)

    # -- signals ------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        match number:
            case signal.SIGHUP:
                self._try_reload()
            case signal.SIGUSR1:
                self._scan(until_settled=False, call=None)
            case signal.SIGUSR2:
                log.info("%s", report.summary(self.pipeline, self._paused))
                for target in self._status()["targets"]:
                    log.info("%s", target)
            case signal.SIGTERM | signal.SIGINT:
                log.info("stopping")
                self._leaving = True
                self.loop.stop()

    def _try_reload(self) -> None:
        self.manager.reloading()
        try:
            self._reload()
        except KsmdError as error:
            log.error("the old settings stay: %s", error)
        self.manager.ready()

    def _reload(self) -> None:
        if self._config is None:
            raise KsmdError("ksmd was started without --config, there is nothing to read again")
        given = Reading(self._config).result()
        old, new = self._settings, given.settings
        self.server.permit(int(new.socket_mode, 8), listening.group_id(new.socket_group))
        self._tuning.reload(new, given.sources)
        self.pipeline.targets.settings = new
        log.info("settings read again: %s", given.changes(self._given))
        self._given = given
        if new.run == "unmerge" and old.run != "unmerge":
            self._unmerge(None, None)
        self.loop.hurry()

    # -- the control socket ---------------------------------------------------------------------

    def dispatch(
        self, method: str, parameters: dict[str, Any], call: Call
    ) -> dict[str, Any] | None:
        """Answer one call of org.ksmd.Control; None when the answer comes later."""
        with self.programs.admitted(method, call):
            return self._dispatch(method, parameters, call)

    def _dispatch(
        self, method: str, parameters: dict[str, Any], call: Call
    ) -> dict[str, Any] | None:
        match method:
            case "GetApiVersion":
                return {"version": 1}
            case "Status" | "Targets":
                short = method == "Targets"
                status = {"targets": report.targets(self.pipeline)} if short else self._status()
                return status | self._visible(call, status["targets"])
            case "Scan" if parameters.get("scan") is None:
                return self._scan_all(parameters, call)
            case "Unmerge":
                return self._unmerge_asked(call, **parameters)
            case "Pause":
                self._paused, self._guardian.awaited = True, False
                return {}
            case "Resume":
                self._tuning.resume()
                self.pipeline.targets.settings = self._tuning.effective
                self._resume()
                return {}
            case "Features":
                return {"features": [_feature(feature) for feature in self.features]}
            case "Reload":
                self._reload()
                return {}
            case "Plan":
                return report.plan(self.pipeline)
            case "GetInfoThread" | "StartStopThread":
                if method == "StartStopThread":
                    self._start_stop(ThreadInfo(**parameters))
                    return {}
                return asdict(self._tuning.info(self._paused))
            case "Why":
                self.programs.check_own(call, parameters["pid"])
                return self._why(**parameters)
        return self.programs.dispatch(method, parameters, call)

    def _scan_all(self, parameters: dict[str, Any], call: Call) -> dict[str, Any] | None:
        if call.peer.uid != 0:
            raise denied("only root may scan everything", "CreateScan makes a scanner")
        waits = bool(parameters.get("wait"))
        self._scan(bool(parameters.get("until_settled")), call if waits else None)
        return None if waits else _asked(AskedResult(0, 0, settled=False, passes=0))

    def _start_stop(self, info: ThreadInfo) -> None:
        """Set what the thread does until the next restart or reload (KSM_START_STOP_KTHREAD)."""
        self._tuning.start_stop(info)
        self.pipeline.targets.settings = self._tuning.effective
        if self._settings.run == "merge":
            self._resume()
        elif self._settings.run == "unmerge":
            self._unmerge(None, None)

    def _closed(self, connection: int) -> None:
        self.programs.closed(connection)

    def _visible(self, call: Call, targets: list[dict[str, Any]]) -> dict[str, Any]:
        return {"targets": self.programs.visible(call, self.server.gid, targets)}

    def _status(self) -> dict[str, Any]:
        status = report.status(self.pipeline, self._paused, self._ours)
        status.sources = self._tuning.sources()
        return report.as_dict(status)

    def _scan(self, until_settled: bool, call: Call | None) -> None:
        last: list[AskedResult] = []

        def interim(result: AskedResult) -> None:
            last[:] = [result]
            if call is not None:
                call.reply(_asked(result), continues=True)

        def done() -> None:
            if call is not None:
                call.reply(_asked(last[0]))

        steps = self.pipeline.asked_scan(until_settled)
        self.loop.add(Job("scan", steps, interim, done, _fail(call)))

    def _unmerge_asked(
        self,
        call: Call,
        pid: int | None = None,
        wait: bool | None = None,
        until_pager: bool | None = None,
    ) -> dict[str, Any] | None:
        awaited = bool(until_pager) and (self._guardian.awaited or not self._paused)
        answer = self._unmerge(pid, call, bool(wait))
        if pid is None:
            self._guardian.awaited = awaited
        return answer

    def _unmerge(
        self, pid: int | None, call: Call | None, wait: bool = False
    ) -> dict[str, Any] | None:
        if pid is None:
            targets = list(self.pipeline.targets)
        else:
            target = self.pipeline.targets.by_pid(pid)
            if target is None:
                raise CallError(
                    "NotRegistered",
                    pid=pid,
                    message=f"process {pid} is no target of ksmd",
                    hint="`ksmctl targets` lists them",
                )
            targets = [target]
        self.pipeline.unmerger.check_memory(targets)
        expected = sum(target.merged_pages for target in targets)
        last = UnmergeResult()

        def interim(result: UnmergeResult) -> None:
            nonlocal last
            last = result

        def done() -> None:
            if call is not None and wait:
                call.reply(_unmerged(last))

        # whoever asks for memory back does not want the next scan to take it again
        if pid is None:
            self._paused = True
        else:
            targets[0].release()
        steps = self.pipeline.merging.holding(self.pipeline.unmerger.unmerge(targets))
        self.loop.add(Job("unmerge", steps, interim, done, _fail(call if wait else None)))
        return None if wait else {"pages": expected}

    def _resume(self) -> None:
        """Scan on; targets that were unmerged by request may be merged again."""
        self._paused = self._guardian.awaited = False
        for target in self.pipeline.targets:
            target.released = False
        self.loop.hurry()

    def _why(self, pid: int, address: int | None = None, start: int = 0) -> dict[str, Any]:
        answer = report.why(self.pipeline, pid, address, start)
        if answer is None:
            raise CallError(
                "NotRegistered",
                pid=pid,
                message=f"process {pid} is no target of ksmd",
                hint="no rule of the settings selects it; `ksmctl targets` lists who is",
            )
        return answer


def require_features() -> tuple[Feature, ...]:
    """Probe the kernel and prove the guard; refuse to go on without what is needed."""
    if absent := capabilities.missing():
        raise PrivilegeError(
            f"ksmd lacks {', '.join(absent)}", "start it as root with sudo, or as a system service"
        )
    features = (*probe(), selftest.run())
    missing = [feature for feature in features if feature.needed and not feature.present]
    if missing:
        first = missing[0]
        raise KernelFeatureError(
            f"this kernel or sandbox lacks {first.name}: {first.detail}",
            f"{first.without}; `ksmctl features` shows everything",
        )
    return features


def own_unit() -> str:
    """Give the name of the unit that this process runs in, "" outside of any."""
    return procfs.process_info(os.getpid()).unit


def _feature(feature: Feature) -> dict[str, Any]:
    return {
        "name": feature.name,
        "present": feature.present,
        "needed": feature.needed,
        "detail": feature.detail,
        "without": feature.without,
    }


def _asked(result: AskedResult) -> dict[str, Any]:
    return {
        "scanned": result.scanned,
        "merged": result.merged,
        "settled": result.settled,
        "passes": result.passes,
    }


def _unmerged(result: UnmergeResult) -> dict[str, Any]:
    answer: dict[str, Any] = {"pages": result.pages}
    if result.left:
        reason = result.reason or Reason.WINDOW_FAILED
        answer["refused"] = [report.refusal(reason, f"{result.left} pages", result.detail)]
    return answer


def _fail(call: Call | None) -> Callable[[KsmdError], None]:
    def fail(error: KsmdError) -> None:
        log.error("%s", error)
        if call is not None:
            call.error(
                "Failed", message=str(error), hint=error.hint, exit_code=int(error.exit_code)
            )

    return fail


def _nothing() -> None:
    pass


def _last(tell: Callable[[UnmergeResult], None]) -> Callable[[UnmergeResult], None]:
    """Pass on only the result that is complete: interim ones have nothing left behind yet."""

    def remember(result: UnmergeResult) -> None:
        if result.left:
            tell(result)

    return remember
