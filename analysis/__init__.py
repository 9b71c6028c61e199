"""What a network does on data: forged layers and their spectra, attacks, evaluation and reports."""

if not __name__.startswith("lipbounds."):
    raise ImportError("this folder is the package lipbounds.analysis: write `import lipbounds.analysis`")

from lipbounds.analysis.apgd import apgd as apgd
from lipbounds.analysis.attack_network import Oracle as Oracle
from lipbounds.analysis.attack_search import Attack as Attack
from lipbounds.analysis.attack_search import random_targets as random_targets
from lipbounds.analysis.attack_settings import AttackSettings as AttackSettings
from lipbounds.analysis.attacks import fgsm as fgsm
from lipbounds.analysis.attacks import mi_fgsm as mi_fgsm
from lipbounds.analysis.attacks import pgd as pgd
from lipbounds.analysis.autoattack import AutoAttack as AutoAttack
from lipbounds.analysis.autoattack import autoattack as autoattack
from lipbounds.analysis.diagnostics import diagnose as diagnose
from lipbounds.analysis.fab import fab as fab
from lipbounds.analysis.forge_search import search_c_r as search_c_r
from lipbounds.analysis.forging import forge as forge
from lipbounds.analysis.forging import load_forged as load_forged
from lipbounds.analysis.frank_wolfe import frank_wolfe as frank_wolfe
from lipbounds.analysis.generalisation import pac_bayes as pac_bayes
from lipbounds.analysis.generalisation import robust_gap as robust_gap
from lipbounds.analysis.gradient_estimates import black_frank_wolfe as black_frank_wolfe
from lipbounds.analysis.gradient_estimates import nes_pgd as nes_pgd
from lipbounds.analysis.in_distribution import in_distribution as in_distribution
from lipbounds.analysis.in_distribution import nearest_latents as nearest_latents
from lipbounds.analysis.intrinsic import generator_constants as generator_constants
from lipbounds.analysis.intrinsic import intrinsic_robustness as intrinsic_robustness
from lipbounds.analysis.intrinsic import risk_bound as risk_bound
from lipbounds.analysis.loss_geometry import gradient_lipschitz as gradient_lipschitz
from lipbounds.analysis.loss_geometry import hessian_eigenvalue as hessian_eigenvalue
from lipbounds.analysis.loss_geometry import landscape as landscape
from lipbounds.analysis.loss_geometry import loss_increase as loss_increase
from lipbounds.analysis.masking import gradient_masking as gradient_masking
from lipbounds.analysis.odi import odi_pgd as odi_pgd
from lipbounds.analysis.rays import BoundaryDistances as BoundaryDistances
from lipbounds.analysis.rays import adbd as adbd
from lipbounds.analysis.rays import rays as rays
from lipbounds.analysis.robust_accuracy import RobustAccuracy as RobustAccuracy
from lipbounds.analysis.robust_accuracy import robust_accuracy as robust_accuracy
from lipbounds.analysis.smoothing import smooth as smooth
from lipbounds.analysis.spectra import forged_matrix as forged_matrix
from lipbounds.analysis.spectra import gershgorin_discs as gershgorin_discs
from lipbounds.analysis.square import square as square
from lipbounds.analysis.stability import perturbation_stability as perturbation_stability
