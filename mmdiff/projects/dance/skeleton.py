"""SMPL's tree of 24 joints: how they hang together, and where they are by their rotations."""

from __future__ import annotations

import numpy as np

FPS = 60  # frames in a second

# SMPL's tree: every joint's parent, and where it is from there in the T-pose, in metres (x to the dancer's left, y up, z to the front). The
# lengths are those of somebody of 1.7 m, rounded; SMPL's own need its licence.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
LEFT = {  # left joint: (right joint, offset of the left one)
    1: (2, (0.06, -0.09, 0.0)),  # hip
    4: (5, (0.04, -0.38, 0.0)),  # knee
    7: (8, (-0.01, -0.42, -0.03)),  # ankle
    10: (11, (0.03, -0.06, 0.12)),  # foot
    13: (14, (0.08, 0.11, -0.02)),  # collar bone
    16: (17, (0.10, 0.04, -0.01)),  # shoulder
    18: (19, (0.26, -0.01, -0.02)),  # elbow
    20: (21, (0.25, 0.01, 0.0)),  # wrist
    22: (23, (0.08, -0.01, -0.01)),  # hand
}
_MIDDLE = {
    0: (0.0, 0.0, 0.0),  # pelvis
    3: (0.0, 0.12, -0.03),
    6: (0.0, 0.13, 0.02),
    9: (0.0, 0.06, 0.0),  # spine
    12: (0.0, 0.21, -0.03),  # neck
    15: (0.0, 0.09, 0.05),  # head
}
OFFSETS = np.zeros((len(PARENTS), 3))
for _joint, _offset in _MIDDLE.items():
    OFFSETS[_joint] = _offset
for _left, (_right, _offset) in LEFT.items():
    OFFSETS[_left] = _offset
    OFFSETS[_right] = _offset * np.array([-1, 1, 1])
HIP, KNEE, ANKLE, SHOULDER, ELBOW, ROOT, WAIST, CHEST, NECK = 1, 4, 7, 16, 18, 0, 3, 9, 12


def joints(rotations: np.ndarray) -> np.ndarray:
    """Where the joints [..., 24, 3] are, in metres from the pelvis, by their rotation vectors [..., 24, 3] relative to their parents.

    Joint j is at `x_p + R_0 ... R_p offset_j`, p its parent, the product over the joints from the pelvis to p; R by Rodrigues' formula.
    """
    angle = np.linalg.norm(rotations, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(rotations / np.maximum(angle[..., 0], 1e-8), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    turned = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    found = np.zeros(rotations.shape)
    for joint, parent in enumerate(PARENTS[1:], 1):
        found[..., joint, :] = found[..., parent, :] + turned[..., parent, :, :] @ OFFSETS[joint]
        turned[..., joint, :, :] = turned[..., parent, :, :] @ turned[..., joint, :, :]
    return found


def centred(motion: np.ndarray) -> np.ndarray:
    """Joints [frames, joints, 3] from the mean place of joint 0, float32."""
    return (motion - motion[:, 0].mean(0)).astype(np.float32)
