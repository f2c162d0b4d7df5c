from sklearn.utils.estimator_checks import parametrize_with_checks

from dinovmf_plugin.mixture import VonMisesFisherMixture


@parametrize_with_checks(
    [VonMisesFisherMixture(), VonMisesFisherMixture(n_components=2, random_state=0)]
)
def test_check_estimator(estimator, check):
    check(estimator)
