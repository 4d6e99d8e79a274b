"""What the parametric hand is made of: measures of people, joint limits, gestures, flesh.

Hand frame of a right hand: origin at the wrist, x radial (to the thumb), y proximal (to the forearm), z
dorsal. Lengths are mm, angles degrees.
"""

# Mean and standard deviation of bone lengths in mm: metacarpal, proximal, middle, distal phalanx (thumb: way
# from the wrist to its carpometacarpal joint, metacarpal, proximal, distal). Buryanov & Kotiuk 2010,
# Proportions of Hand Segments, Int. J. Morphol. 28(3):755-758; the first number of the thumb
# only scales its way in the CARPAL_MM below.
BONES_MM = (
    (30.0, 46.22, 31.57, 21.67),
    (68.12, 39.78, 22.38, 15.82),
    (64.60, 44.63, 26.33, 17.40),
    (58.00, 41.37, 25.65, 17.30),
    (53.69, 32.74, 18.11, 15.96),
)
BONES_SD_MM = (
    (2.5, 3.94, 3.13, 1.60),
    (6.27, 4.94, 2.51, 2.26),
    (5.38, 3.81, 3.00, 1.85),
    (5.06, 3.87, 3.29, 2.22),
    (4.36, 2.77, 2.54, 2.45),
)
BONE_LIMIT_SD = 2.5  # no bone further from its mean than this many standard deviations
SOFT_TIP_MM = 3.9  # flesh beyond the distal phalanx (same paper)
SIZE_SHARE = 0.8  # share of a bone's variation that is the whole hand's size, the rest is its own
# Girth over the mean hand's: hand breadth 79.4 +- 3.8 mm (women) to 90.4 +- 4.2 mm (men), Greiner 1991, Hand
# Anthropometry of U.S. Army Personnel, TR-92/011.
GIRTH_LIMITS = (0.82, 1.2)

# Anatomical limits in degrees. Fingers: flexion 0..90 (MCP), 0..110 (PIP), abduction +-15, DIP = 2/3 PIP from
# Lin, Wu & Huang 2000, Modeling the Constraints of Human Hand Motion; hyperextension, thumb and wrist within
# the ranges of the American Academy of Orthopaedic Surgeons, Joint Motion, 1965 (thumb abduction 0..70, MCP
# 0..50, IP 0..80, wrist flexion -70..80, deviation 20 radial, which is positive here, and 30 ulnar), but
# that the thumb goes 15 degrees across the palm, its MCP from -5 to 55 and its IP from -15.
LIMITS_DEG = {
    "thumb_radial": (-15, 65),
    "thumb_palmar": (0, 65),
    "thumb_mcp": (-5, 55),
    "thumb_ip": (-15, 80),
    "mcp": (-20, 90),
    "abduction": (-15, 15),
    "pip": (0, 110),
    "dip": (-5, 80),
    "wrist_flexion": (-65, 70),
    "wrist_deviation": (-30, 20),
}
ANGLES = (
    *("thumb_radial", "thumb_palmar", "thumb_mcp", "thumb_ip"),
    *("mcp", "abduction", "pip", "dip") * 4,
    *("wrist_flexion", "wrist_deviation"),
)
DIP_OVER_PIP = 2 / 3
DIP_SPREAD_DEG = 4

# Thumb (radial, palmar abduction, MCP, IP) and finger (MCP, PIP) states that gestures are made of, degrees.
THUMB = {
    "out": (46, 8, 0, 0),
    "side": (22, 14, 12, 10),
    "beside": (27, 13, 12, 10),
    "across": (15, 41, 18, 68),
    "on index": (36, 35, 38, 78),
    "in": (20, 48, 55, 38),
    "palm": (4, 8, 55, 76),
    "low": (18, 19, 55, 74),
    "between 1 and 2": (36, 0, 50, 80),
    "between 2 and 3": (14, 0, 55, 80),
    "between 3 and 4": (12, 8, 55, 80),
    "lateral": (9, 20, 4, 34),
    "opposed": (32, 50, 10, 18),
    "parallel": (28, 58, 5, 6),
    "tip": (46, 40, 40, 62),
    "index": (36, 43, 34, 30),
    "middle": (9, 52, 27, 2),
    "ring": (0, 59, 21, 42),
    "little": (5, 64, 52, 35),
    "on little": (7, 56, 54, 37),
}
# S straight, R relaxed, C closed, L loosely so, H hooked, E with the knuckle bent too, D draped over the
# thumb, F flat and bent at the knuckle, K a little less, P and O with the tip at the thumb's, B bent evenly,
# X before and Y behind a finger that it crosses, T over the thumb, M tightly so.
FINGER = {
    "S": (2, 4),
    "R": (22, 28),
    "C": (84, 104),
    "L": (70, 84),
    "H": (8, 92),
    "E": (36, 108),
    "D": (74, 86),
    "F": (70, 12),
    "K": (60, 6),
    "P": (58, 52),
    "O": (60, 58),
    "B": (38, 40),
    "X": (16, 12),
    "Y": (-10, 6),
    "T": (73, 81),
    "M": (72, 89),
}
# Gesture: thumb state and the states of index, middle, ring and little finger, then how far they are spread
# (0..1) or their abductions in degrees. Single capitals: letters that no other gesture shows.
GESTURES = {
    "open": ("out", "SSSS", 0.8),
    "flat": ("side", "SSSS", 0.0),
    "relaxed": ("side", "RRRR", 0.3),
    "fist": ("across", "CCCC", 0.0),
    "fist, thumb on index": ("on index", "CCCC", 0.0),
    "thumb up": ("out", "CCCC", 0.0),
    "point": ("across", "SCCC", 0.0),
    "gun": ("out", "SCCC", 0.0),
    "two": ("in", "SSCC", 0.7),
    "three": ("on little", "SSSL", 0.6),
    "three, thumb": ("out", "SSCC", 0.6),
    "four": ("palm", "SSSS", 0.6),
    "horns": ("across", "SCCS", 0.2),
    "horns, thumb": ("out", "SCCS", 0.2),
    "Y": ("out", "CCCS", 0.3),
    "little": ("across", "CCCS", 0.0),
    "claw": ("out", "HHHH", 0.5),
    "hook": ("side", "HHHH", 0.0),
    "duck": ("index", "FFFF", 0.0),
    "ok": ("index", "PSSS", 0.6),
    "index pinch": ("index", "PRRR", 0.3),
    "middle pinch": ("middle", "SPSS", 0.4),
    "ring pinch": ("ring", "SSPS", 0.4),
    "little pinch": ("little", "SSSP", 0.4),
    "grasp": ("index", "PPPP", 0.2),
    "bottle": ("opposed", "BBBB", 0.3),
    "key": ("beside", "LLLL", 0.0),
    "index bent": ("across", "HCCC", 0.0),
    "A": ("beside", "CCCC", 0.0),
    "B": ("palm", "SSSS", 0.0),
    "C": ("opposed", "BBBB", 0.0),
    "D": ("middle", "SPPP", 0.0),
    "E": ("low", "EEEE", 0.0),
    "G": ("side", "FCCC", 0.0),
    "H": ("across", "SSCC", 0.0),
    "K": ("lateral", "SKCC", 0.2),
    "M": ("between 3 and 4", "MMMC", 0.0),
    "N": ("between 2 and 3", "DDCC", 0.0),
    "O": ("tip", "OOOO", 0.0),
    "Q": ("parallel", "FCCC", 0.0),
    "R": ("in", "XYCC", (-14, 14, 0, 0)),
    "T": ("between 1 and 2", "TCCC", 0.0),
    "X": ("across", "ECCC", 0.0),
}
SPREAD_DEG = (11, 3, -5, -12)  # abduction of index .. little at spread 1, to the thumb positive
# Drawn so many times as often as the others: palms of fists are the hardest to tell from backs.
OFTEN = {"A": 2, "E": 2, "M": 3, "T": 2}
# Ring and little finger close less firmly in some hands: by up to this share of their knuckles' flexion.
SLACK = (0.0, 0.0, 0.2, 0.4)

# The 21 joints: the wrist, then base, middle, end joint and tip of thumb, index, middle, ring, little (thumb:
# CMC, MCP, IP).
CARPAL_MM = (
    (19.0, -20.0, -8.0),
    (9.0, -26.0, 1.0),
    (0.5, -28.0, 2.0),
    (-8.0, -25.0, 1.0),
    (-16.0, -21.0, -2.0),
)
METACARPAL_DEG = (13.0, 3.0, -8.0, -19.0)  # direction of the four metacarpals in the palm's plane
# Bent by 90 degrees, fingers lean so far to the middle one: those of a fist lie side by side.
CONVERGENCE_DEG = (-3.0, 0.0, 5.0, 11.0)
PALM_MM = 11.0  # half the palm's thickness along the metacarpals
# Radii of the flesh in mm on the mean hand at base, middle, end joint and tip of thumb .. little.
RADII_MM = (
    (14.4, 12.4, 11.0, 9.2),
    (11.6, 9.8, 8.5, 7.3),
    (12.0, 10.0, 8.7, 7.4),
    (11.4, 9.4, 8.2, 7.1),
    (10.4, 8.3, 7.2, 6.3),
)
# Thickness of the thumb's end joint and tip, over its radii, where overlaps are judged: fingers on a thumb
# press it flat. Rendered it is round all the same.
THUMB_FLAT = 0.8
# A stretched palm is flat, or hollow between the balls of the thumb and of the little finger, more so in some
# people than in others: radius of the thumb's base, and how far the balls rise out of the palm, with their
# radii, where it is flat and where it is hollow, and by how much more in a fist, whose fingers press on them.
THUMB_BASE_MM = (10.5, 14.4)
BALLS_MM = ((-4.0, 2.5, 8.0), (-2.5, 3.5, 9.5))
BALL_RADII_MM = ((9.0, 15.0, 2.0), (9.0, 13.0, 3.0))
# Thickness of fingers and palm over what girth makes of them: the least and the largest.
FINGER_GIRTH, PALM_GIRTH = (0.92, 1.1), (0.95, 1.15)
# Fingers that touch leave grooves so deep; nothing fills the gap once their skin is so far apart.
GROOVE_MM, PARTED_MM = 2.0, 6.0
# As the knuckles bend the balls move to the fingers, in a fist by this share of the bone that they lie on,
# and the heel of the hand comes out so far from where the little finger's metacarpal begins; its radius in
# a stretched palm and in a fist.
BALLS_FORWARD = 0.15
HEEL_MM, HEEL_RADIUS_MM = (-6.0, 2.0, -6.0), (13.0, 14.0)
# Two spheres rise out of the palm of a fist: one below the fingertips, one between the balls. Their radius
# in a stretched palm and in a fist; how far from the balls to the knuckles the first is; by what share each
# rises less where a stretched palm is hollow.
CUSHION_MM, CUSHION_FORWARD, RISING_LESS = (12.0, 14.0), 0.25, (0.45, 0.6)
# How far a thumb under the fingers lifts its ball and these two; its radial and palmar abduction and the bend
# of both its joints where it is beside or before them, and where it is wholly under them.
TUCKED_MM = (11.0, 20.0, 7.0)
TUCKED_DEG = ((40, 20), (20, 5), (40, 120))
# How much thicker a finger's base, middle joint, end joint and tip are per radian of the middle joint's bend.
BULGE = (0.03, 0.05, 0.03, 0.0)
# Of the arm's two spheres at the wrist, and their growth over 250 mm: half their distance, radius.
ARM_MM = ((9.5, 4.0), (19.0, 8.0))
SLEEVE_MM = (10.0, 5.0)  # cloth and folds at the sleeve's end and at the elbow
# Spheres of the surface: 4 a finger (0..19), then what `_palm_spheres`, `_forearm_spheres`
# and `_groove_spheres` add.
CARPUS_INDEX, HEEL, THENAR, WEB_THUMB, HYPOTHENAR, CUSHION, BETWEEN_BALLS = range(20, 27)
WEBS = range(27, 30)
WRIST_R, WRIST_U, ELBOW_R, ELBOW_U, SLEEVE_R, SLEEVE_U = range(30, 36)
# Middle joint, end joint and tip of the groove of index and middle finger, then of the other two grooves.
GROOVES = range(36, 45)
# Wedges (hulls of three spheres, after Tkach, Pauly & Tagliasacchi 2016, Sphere-Meshes for Real-Time Hand
# Modeling and Tracking) and cones (hulls of two); a wedge's edges are cones as well.
HAND_WEDGES = (
    (4, 8, CARPUS_INDEX),
    (8, CARPUS_INDEX, HEEL),
    (8, 12, HEEL),
    (12, 16, HEEL),
    (0, THENAR, CARPUS_INDEX),
    (0, 1, WEB_THUMB),
    (0, CARPUS_INDEX, WEB_THUMB),
    (THENAR, 1, WEB_THUMB),
    (16, HYPOTHENAR, HEEL),
    (THENAR, CARPUS_INDEX, WRIST_R),
    (HYPOTHENAR, HEEL, WRIST_U),
    (THENAR, CARPUS_INDEX, HEEL),
    (CARPUS_INDEX, HEEL, WRIST_R),
    (HEEL, WRIST_R, WRIST_U),
    (0, CARPUS_INDEX, WRIST_R),
    (THENAR, CUSHION, BETWEEN_BALLS),
    (HYPOTHENAR, CUSHION, BETWEEN_BALLS),
    (0, HEEL, BETWEEN_BALLS),
    (0, THENAR, BETWEEN_BALLS),
    (HYPOTHENAR, HEEL, BETWEEN_BALLS),
    *((4 * k, 4 * k + 4, web) for k, web in enumerate(WEBS, start=1)),
)
HAND_CONES = (
    *((4 * k + j, 4 * k + j + 1) for k in range(5) for j in range(3)),
    *((web, GROOVES[3 * k]) for k, web in enumerate(WEBS)),
    *((GROOVES[3 * k + j], GROOVES[3 * k + j + 1]) for k in range(3) for j in range(2)),
)
ARM_WEDGES = (
    (WRIST_R, WRIST_U, ELBOW_R),
    (WRIST_U, ELBOW_R, ELBOW_U),
    (SLEEVE_R, SLEEVE_U, ELBOW_R),
    (SLEEVE_U, ELBOW_R, ELBOW_U),
)
