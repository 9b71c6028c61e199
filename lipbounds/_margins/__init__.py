"""Certified radii, and margins on balls by Lagrangian duality: constraints of every neuron, with affine terms.

Around an input with pre-activations h (less the kink), every point of the ball moves the pre-activation of a relu by d
and its value by w. With p = relu(h), q = relu(-h), v = w + p = relu(h + d) and r = w - d + q = relu(-h - d), and proved
ranges -bottom <= h + d <= top,

    v r = 0,    v (v - top) <= 0,    r (r - bottom) <= 0,    top r + bottom v <= top bottom,

and for the input ||u||^2 <= eps^2 and, of the box, (u - low)(u - high) <= 0 per entry. d and the margin are linear in
(u, w). With multipliers of any sign M for the equations and lambda, beta, tau_v, tau_r, nu >= 0 for the inequalities,
the margin on the ball is at least

    z_y - z_i  +  min over (u, w) of  aim' dz + lambda (||u||^2 - eps^2) + sum beta (u - low)(u - high)
        + sum M v r + tau_v v (v - top) + tau_r r (r - bottom) + nu (top r + bottom v - top bottom),

an unconstrained quadratic. Neurons that are stable on the ball (top or bottom 0) are linear and have no multiplier.

The constraints imply others: v, r >= 0, as v (top - v) >= 0; the range of d; and the sector of the slopes between the
centre and any point, which bounds of the increment use: for h > 0 and the chord slope a = h / (h + bottom), the
multipliers tau_r = A a, M = A (1 - a) are those of A (w - d)(w - a d) <= 0; likewise tau_v for h <= 0. So the best
multipliers prove at least z_y - z_i - eps L_yi(eps), and the search begins near there.

Any other function of one number has a curve in the place of v r = 0. Let its slopes on the range be in [b, b + g], so
that it moves by b d + g w with slopes of w in [0, 1]. With p and q such that v = w + p >= 0 and r = w - d + q >= 0 on
the range, v rises from 0 to top while r falls from bottom to 0. For a point (V, R) of the curve, and chords of w from
it with slopes in [a, c],

    ((1-c)(v - V) + c (r - R)) ((1-a)(v - V) + a (r - R)) <= 0 ,

and lines bound the curve from above and below. The form around the centre is the sector of the ellipsoids, where the
search begins. All of them are products of v^2, v r, r^2, v, r and 1, as are those of a relu (`forms`).

`ranges` narrows the ranges by lines, `search` finds the multipliers in float arithmetic, `proof` proves what they are
worth, `problem` prepares all of them.
"""
