"""Sends a request to the replica that holds its prefix, else to the least loaded one.

Serve copies this module's classes by value into the processes that route: what they share with the
gateway stands in another module, which is imported there as it is.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from . import prefixes
from .relayed import RelayedRequest


class PrefixRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types here
    """The request router of the engine's deployment.

    `affinity=False` (request_router_kwargs) looks at the load only.
    """

    def initialize_state(self, affinity: bool = True) -> None:
        """Takes the keyword arguments of the deployment's request_router_config."""
        self._affinity = affinity

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: the preferred one, then all, of which Serve takes the least loaded."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        prefixes.STATE.replicas = set(by_name)
        asked = _relayed(pending_request)
        if asked is not None and asked.replica is not None:
            wanted = by_name.get(asked.replica)
            return [[wanted]] if wanted is not None else [candidate_replicas]
        loads = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for name, replica in by_name.items()
        }
        keys = asked.keys if asked is not None and self._affinity else []
        preferred = prefixes.STATE.choose(keys, loads)
        return [[by_name[preferred]], candidate_replicas] if preferred else [candidate_replicas]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Notes where a conversation went."""
        asked = _relayed(pending_request)
        if asked is None or not asked.keys or asked.replica is not None:
            return
        prefixes.STATE.routed_to(replica_id.unique_id, asked.keys)


def _relayed(pending: PendingRequest | None) -> RelayedRequest | None:
    arguments = pending.args if pending is not None else ()
    return arguments[0] if arguments and isinstance(arguments[0], RelayedRequest) else None
