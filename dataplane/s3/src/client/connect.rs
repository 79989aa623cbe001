//! Builds the SDK's client from a [`BucketConfig`] and the environment.
//!
//! SDK retries are off, checksums only where S3 requires them (so that servers that know no
//! trailing checksums work), TLS is rustls on ring. A plain-http endpoint gets a connector without
//! TLS, which needs no root certificates on the machine.

use aws_config::{
    BehaviorVersion, Region, environment::EnvironmentVariableRegionProvider,
    meta::region::RegionProviderChain, profile::ProfileFileRegionProvider,
};
use aws_sdk_s3::{
    Client,
    config::{
        Credentials, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
        StalledStreamProtectionConfig,
    },
};
use aws_smithy_http_client::{
    Builder, Connector,
    proxy::ProxyConfig,
    tls::{Provider, rustls_provider::CryptoMode},
};
use aws_smithy_types::{retry::RetryConfig, timeout::TimeoutConfig};

use crate::config::BucketConfig;

const REGION_DEFAULT: &str = "us-east-1";

pub(super) async fn client(config: &BucketConfig) -> Client {
    let secure = http_client(true);
    let region = RegionProviderChain::first_try(config.region.clone().map(Region::new))
        .or_else(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new())
        .or_else(Region::new(REGION_DEFAULT))
        .region()
        .await;
    let mut loader =
        aws_config::defaults(BehaviorVersion::latest()).http_client(secure.clone()).region(region);
    if let Some(keys) = &config.credentials {
        loader = loader.credentials_provider(Credentials::new(
            keys.access_key.clone(),
            keys.secret_key.clone(),
            keys.session_token.clone(),
            None,
            "ebb-configuration",
        ));
    }
    if let Some(endpoint) = &config.endpoint {
        loader = loader.endpoint_url(endpoint.clone());
    }
    let shared = loader.load().await;

    let foreign = shared.endpoint_url().is_some()
        || std::env::var_os("AWS_ENDPOINT_URL_S3").is_some_and(|url| !url.is_empty());
    let plain = shared.endpoint_url().is_some_and(|url| url.starts_with("http://"));
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(config.timeouts.connect())
        .operation_attempt_timeout(config.timeouts.request())
        .operation_timeout(config.timeouts.request())
        .build();
    let mut sdk = aws_sdk_s3::config::Builder::from(&shared)
        .http_client(if plain { http_client(false) } else { secure })
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .force_path_style(config.path_style.unwrap_or(foreign));
    if let Some(endpoint) = &config.endpoint {
        // Named in the configuration, so it also wins over AWS_ENDPOINT_URL_S3.
        sdk = sdk.endpoint_url(endpoint.clone());
    }
    Client::from_conf(sdk.build())
}

fn http_client(secure: bool) -> SharedHttpClient {
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut builder = Connector::builder();
        builder.set_connector_settings(settings.cloned());
        builder.set_sleep_impl(components.and_then(|c| c.sleep_impl()));
        if secure {
            builder
                .proxy_config(ProxyConfig::from_env())
                .tls_provider(Provider::Rustls(CryptoMode::Ring))
                .build()
        } else {
            // A plain-http endpoint is a server of one's own, never beyond a proxy.
            builder.build_http()
        }
    })
}
