"""The network variables that follow from a node's hardware: exact HCA list and bootstrap interface. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.job.resolved import EnvVar
from janus_cluster.preflight.hca import port_name, usable_rails

ORIGIN = "preflight of this node"


def derive_network_env(
    facts: Mapping[str, Any], profile: Mapping[str, Any], user_env: Mapping[str, str]
) -> list[EnvVar]:
    """Variables to export on this node; a name that `user_env` holds is left unchanged (the lint judges it).

    `facts` holds hca (where the profile requires InfiniBand) and route. Without a rail NCCL_IB_HCA is not set:
    NCCL_NET=IB then fails, whereas an empty list would mean every port.
    """
    derived: list[EnvVar] = []
    wanted = profile["hca"]["wanted"] and "hca" in facts
    sound = [port_name(p) for p in usable_rails(facts["hca"], profile["hca"])] if wanted else []
    if sound:
        derived.append(
            EnvVar(
                name="NCCL_IB_HCA",
                value="=" + ",".join(sound),
                reason=f"The {len(sound)} rails of this node, from sysfs; = means these and no others.",
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
