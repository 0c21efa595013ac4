"""What two Helm charts make of the values that deploy/helm gives them; anything else is refused here, where the charts may ignore it.

Written from the charts' own schemas and templates: vllm-stack 0.1.12 and app-template 4.1.1, against whose schemas the files passed too.
"""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+([KMGT]i?)?$"}
STORED = {"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}}


def exactly(needed: str = "", **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others; ``needed``: those that must be there."""
    return {"type": "object", "additionalProperties": False, "required": needed.split(), "properties": properties}


def many(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": value, "minProperties": 1}


def each(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": value, "minItems": 1}


HTTP = exactly("path port", path=TEXT, port={"type": ["integer", "string"]})
PROBE = exactly("httpGet", httpGet=HTTP, initialDelaySeconds=NUMBER, timeoutSeconds=NUMBER, periodSeconds=NUMBER, failureThreshold=NUMBER)

VLLM_STACK = exactly(
    "servingEngineSpec",
    servingEngineSpec=exactly(
        "modelSpec",
        enableEngine=FLAG,
        runtimeClassName=TEXT,
        strategy=exactly("type", type={"enum": ["Recreate", "RollingUpdate"]}),
        startupProbe=PROBE,
        # The template stops without the first four, and writes replicas and requests from the others.
        modelSpec=each(
            exactly(
                "name repository tag modelURL replicaCount requestCPU requestMemory requestGPU",
                name=TEXT,
                repository=TEXT,
                tag=TEXT,
                modelURL=TEXT,
                replicaCount=NUMBER,
                requestCPU=NUMBER,
                requestMemory=QUANTITY,
                requestGPU=NUMBER,
                pvcStorage=QUANTITY,
                pvcAccessMode=STORED,
                vllmConfig=exactly(enablePrefixCaching=FLAG, dtype=TEXT, maxModelLen=NUMBER, maxNumSeqs=NUMBER, extraArgs=each(TEXT)),
                env=each(exactly("name value", name=TEXT, value=TEXT)),
                # Written as they are into the pod, so these are Kubernetes'.
                extraVolumes=each(
                    exactly(
                        "name",
                        name=TEXT,
                        configMap=exactly("name", name=TEXT),
                        persistentVolumeClaim=exactly("claimName", claimName=TEXT),
                    )
                ),
                extraVolumeMounts=each(exactly("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
            )
        ),
    ),
    extraObjects=each({"type": "object", "required": ["apiVersion", "kind", "metadata"]}),
)

MOUNTS = each(exactly("path", path=TEXT, readOnly=FLAG, subPath=TEXT))
APP_PROBE = exactly("enabled custom spec", enabled=FLAG, custom={"const": True}, spec=PROBE)
APP_TEMPLATE = exactly(
    "controllers",
    controllers=many(
        exactly(
            "containers",
            type={"enum": ["deployment", "statefulset", "daemonset"]},
            replicas=NUMBER,
            strategy={"enum": ["Recreate", "RollingUpdate"]},
            containers=many(
                exactly(
                    "image",
                    image=exactly("repository tag", repository=TEXT, tag=TEXT),
                    command=each(TEXT),
                    env=many(TEXT),
                    resources=exactly(limits=many(QUANTITY), requests=many(QUANTITY)),
                    probes=exactly(startup=APP_PROBE, readiness=APP_PROBE, liveness=APP_PROBE),
                )
            ),
        )
    ),
    configMaps=many(exactly("data", data=many(TEXT))),
    service=many(exactly("controller ports", controller=TEXT, ports=many(exactly("port", port=NUMBER)))),
    persistence=many(
        {
            "oneOf": [
                exactly("type identifier", type={"const": "configMap"}, identifier=TEXT, globalMounts=MOUNTS),
                exactly(
                    "type accessMode size",
                    type={"const": "persistentVolumeClaim"},
                    accessMode=STORED["items"],
                    size=QUANTITY,
                    globalMounts=MOUNTS,
                ),
                exactly("type", type={"const": "emptyDir"}, medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY, globalMounts=MOUNTS),
            ]
        }
    ),
)

CHARTS = {"vllm-production-stack.yaml": VLLM_STACK, "sglang-app-template.yaml": APP_TEMPLATE}
"""The schema of each file in deploy/helm."""
