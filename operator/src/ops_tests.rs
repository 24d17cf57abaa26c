use std::time::Duration;

use super::*;

/// Serves the routes on a port of the loopback interface. Returns the address.
async fn serve(liveness: &Liveness, leadership: Leadership) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (metrics, stores) = (athanor_telemetry::metrics(), Stores::new().0);
    let ops = Ops { metrics, ready: Readiness::new(), liveness: liveness.clone(), leadership, stores };
    tokio::spawn(async move { axum::serve(listener, router(ops)).await });
    format!("http://{address}")
}

async fn read(address: &str, path: &str) -> (u16, String) {
    // As in main, where the Kubernetes client chooses the cryptography of the process.
    let url = "http://127.0.0.1:9".parse().unwrap();
    let _client = kube::Client::try_from(kube::Config::new(url)).unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let answer = http.get(format!("{address}{path}")).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn healthz_names_the_loop_that_stands_still() {
    let liveness = Liveness::default();
    let address = serve(&liveness, Leadership::default()).await;
    assert_eq!(read(&address, "/healthz").await, (200, "ok\n".into()), "no loop has begun");
    assert_eq!(read(&address, "/readyz").await.0, 503);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(200)).unwrap();
    liveness.beat("FineTuneJob", Instant::now());
    liveness.beat("ModelDeployment", long_ago);
    let (status, text) = read(&address, "/healthz").await;
    assert_eq!(status, 503);
    assert!(text.starts_with("ModelDeployment has made no progress for 20"), "{text}");
    liveness.beat("ModelDeployment", Instant::now());
    assert_eq!(read(&address, "/healthz").await.0, 200);
}

#[tokio::test]
async fn only_the_leader_counts_objects() {
    for (leadership, leads) in [(Leadership::default(), false), (Leadership::without_election(), true)] {
        let address = serve(&Liveness::default(), leadership).await;
        let text = read(&address, "/metrics").await.1;
        assert!(text.contains(&format!("athanor_operator_leader {}\n", u8::from(leads))), "{text}");
        assert_eq!(text.contains("athanor_finetunejobs{state=\"Running\"} 0\n"), leads, "{text}");
    }
}
