"""Stops a run before its TPU machine is taken away, as the metadata server of Google Cloud announces it.

https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice has the values of `maintenance-event` and
https://cloud.google.com/compute/docs/instances/create-use-spot those of `preempted`;
https://cloud.google.com/compute/docs/metadata/querying-metadata has the requests that wait for a change.
"""

import http.client
import logging
import os
import threading
import urllib.parse

import jax

from EasyLM.training.stop_signal import request_stop

_PLATFORM = "tpu"
# The keys that are watched, and the value of each that announces the end of the machine. MIGRATE_ON_HOST_MAINTENANCE
# announces a live migration, which ends no run, and which TPU machines do not have.
_ENDS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_WAIT_SECONDS = 20  # until the server answers although nothing has changed
_TIMEOUT_SECONDS = 30
_PAUSE_SECONDS = 2  # after each answer or error; a change in the meantime is answered at once
_MOST_BYTES = 1000  # that are read of a value


class MaintenanceWatch:
    """A context that stops a run on TPUs, as SIGTERM does, when the end of its machine is announced.

    Two daemon threads ask the metadata server, at $GCE_METADATA_HOST if it is set. Nothing waits for them or for the
    server; the first failure is logged, and each is tried again. Only a change stops the run: a run that starts during
    a notice, as after a requeue, trains until a signal stops it.
    """

    def __init__(self) -> None:
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._reported = False  # a failure

    def __enter__(self) -> "MaintenanceWatch":
        if jax.default_backend() == _PLATFORM:
            for key in _ENDS:
                threading.Thread(target=self._watch, args=(key,), name=f"watch of {key}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:  # no stop is requested after the exit
            self._closed.set()

    def _watch(self, key: str) -> None:
        value, etag = self._ask(key, "", "0")  # no value has this etag: the server answers at once
        if value == _ENDS[key]:
            logging.warning("%s was %s before this run started; it trains until a signal stops it", key, value)
        while not self._closed.wait(_PAUSE_SECONDS):
            previous = value
            value, etag = self._ask(key, value, etag)
            if value == _ENDS[key] != previous:
                self._stop(key, value)
                return

    def _ask(self, key: str, value: str, etag: str) -> tuple[str, str]:
        """Waits until a key has another value.

        Args:
          value, etag: the last answer.

        Returns:
          The value and its etag; after a failure, those of the last answer.
        """
        try:
            return _request(key, etag)
        except (OSError, http.client.HTTPException, ValueError) as error:
            with self._lock:
                if not self._reported and not self._closed.is_set():
                    logging.warning("cannot read %s from the metadata server: %r", key, error)
                    self._reported = True
            return value, etag

    def _stop(self, key: str, value: str) -> None:
        with self._lock:
            if not self._closed.is_set():
                logging.warning("this machine will be stopped (%s is %s); the run stops as after SIGTERM", key, value)
                request_stop()


def _request(key: str, last_etag: str) -> tuple[str, str]:
    """Returns the value and the etag of a key, as soon as its etag is not `last_etag` or _WAIT_SECONDS have passed.

    Raises:
      OSError: the server is not reachable, or is slow.
      HTTPException: it does not answer with a value, as for a key that it lacks and, for some seconds, in maintenance.
      ValueError: its name is no host's, or the value is not UTF-8.
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    query = f"wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={urllib.parse.quote(last_etag, safe='')}"
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_SECONDS)  # directly: it ignores proxies
    try:
        connection.request("GET", f"/computeMetadata/v1/instance/{key}?{query}", headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        if response.status != http.client.OK or response.headers.get("Metadata-Flavor") != "Google":
            raise http.client.HTTPException(f"{response.status} {response.reason}")
        value = response.read(_MOST_BYTES).decode().strip()
        return value, response.headers.get("ETag", "0")
    finally:
        connection.close()
