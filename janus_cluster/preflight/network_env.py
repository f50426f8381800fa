"""The network variables that follow from a node's hardware: exact HCA list and bootstrap interface. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.config.schema import EnvVar
from janus_cluster.preflight.hca import is_up, port_name, rails

ORIGIN = "preflight of this node"


def derive_network_env(
    facts: Mapping[str, Any], profile: Mapping[str, Any], user_env: Mapping[str, str]
) -> list[EnvVar]:
    """Variables to export on this node; a name that `user_env` holds is left alone (lint says what it thinks of it).

    `facts` holds hca (where the profile wants InfiniBand) and route. No rail found: no list, so that NCCL_NET=IB ends
    the job loudly instead of an empty list meaning every port.
    """
    derived: list[EnvVar] = []
    sound = (
        [port_name(p) for p in rails(facts["hca"]) if is_up(p)] if profile["hca"]["wanted"] and "hca" in facts else []
    )
    if sound:
        derived.append(
            EnvVar(
                name="NCCL_IB_HCA",
                value="=" + ",".join(sound),
                reason=f"The {len(sound)} InfiniBand rails of this node, from sysfs; = means these and no others.",
                origin=ORIGIN,
            )
        )
    route = facts.get("route") or {}
    interface = route.get("interface")
    if interface:
        reason = f"The interface of the route to {route.get('peer') or 'the default gateway'}."
        if profile["gpu"]["wanted"]:
            exact = "= means this interface and none that begins so."
            derived.append(
                EnvVar(name="NCCL_SOCKET_IFNAME", value=f"={interface}", reason=f"{reason} {exact}", origin=ORIGIN)
            )
        bare = "gloo takes the bare name."
        derived.append(EnvVar(name="GLOO_SOCKET_IFNAME", value=interface, reason=f"{reason} {bare}", origin=ORIGIN))
    return [var for var in derived if var.name not in user_env]
